"""Answers by a vLLM server, to which only the policy's adapter is moved.

    publish   write and check a folder -> load it under a new name -> probe -> unload the old name -> delete old folders
    answer    a request for each answer, several at a time -> read strictly -> what failed by the server's fault, again

Every version has a name, a path and a salt of its own, because a server keeps prefixes by them. It is never asked for
the base and an adapter at once: vLLM on CPUs mixes them up in one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from uft_ds.errors import CheckFailed, GeneratorLost, UserError
from uft_ds.host.web import UnderWay
from uft_ds.rollouts.adapter_versions import Adapters, check_servable, delete_old, version_name, write_version
from uft_ds.rollouts.answers import Answer, Answers, PolicyVersion, Question, Sampling, Unanswered
from uft_ds.rollouts.asking import Job, RequestForm, Round
from uft_ds.rollouts.loading import load
from uft_ds.rollouts.patience import Patience
from uft_ds.rollouts.probe import likeliest, takes_logps_before_sampling
from uft_ds.rollouts.server import Client, Refused, Server, TooLate, Unavailable
from uft_ds.scoring.threads import in_threads

_Out = TypeVar("_Out")
_PROBE_NATS = 0.1
"""How far the probe of a version may be from the one before the server was lost. One request alone is exact, also after
a restart; another machine with another card may round differently."""


@dataclass(frozen=True)
class Limits:
    """How hard, and how patiently, a server is asked.

    concurrency: requests at a time. seconds: the longest that one may take. patience_seconds: how long a server that
    gives no answer at all is waited for; a start of vLLM takes minutes.
    """

    concurrency: int = 32
    seconds: float = 600.0
    patience_seconds: float = 1800.0


@dataclass(frozen=True)
class _Version:
    """A version that the server is to answer by. logp: of its probe, nats; None before it is loaded."""

    name: str
    path: Path
    logp: float | None = None


class ServedGenerator:
    """A `Generator` by a server. One thread calls it, on rank 0 alone."""

    on_all_ranks = False
    needs_adapter = True

    def __init__(
        self,
        server: Server,
        sampling: Sampling,
        adapters: Adapters,
        limits: Limits,
        *,
        vocab_size: int,
        stop: Callable[[], None],
        on_event: Callable[[str], None],
    ) -> None:
        """
        Args:
            vocab_size: rows of the policy's embedding; tokens are below it.
            stop: called several times a second by the thread that waits; raises Stopped if the run is to stop.
            on_event: is given lines for the user.
        Raises:
            UserError: the URL is none, or no server takes such an adapter. The server is not asked yet.
        """
        check_servable(adapters.config)
        assert adapters.folder.is_absolute(), "the server would resolve it against its own folder"
        self._client = Client(server)
        self._sampling, self._adapters, self._limits, self._vocab_size = sampling, adapters, limits, vocab_size
        self._stop, self._on_event = stop, on_event
        self._patience = Patience(limits.patience_seconds, self._client.url, stop=stop, on_event=on_event)
        self._current: _Version | None = None
        self._form: dict[str, tuple[int, ...]] = {}
        self._identity: dict[str, Any] | None = None

    def identity(self) -> Mapping[str, Any]:
        """The server's version, base model, dtype if it tells, sampling, and what its log-probs are taken of.

        It is asked once, and again after the server was lost, which may have come back as another one.
        """
        if self._identity is None:
            self._identity = self._patiently(self._identity_of)
        return self._identity

    def publish(self, version: PolicyVersion, tensors: Mapping[str, Tensor]) -> None:
        self._check_form(tensors)
        self._check_logps()
        path = write_version(self._adapters, version, tensors)
        name = self._adapters.named(version_name(version, self._adapters.config))
        before = self._current
        try:
            self._current = self._patiently(lambda client: self._loaded(client, _Version(name, path)))
        except UserError as error:
            if before is None:
                raise
            raise _in_another_form(error) from None
        self._forget_others(before)
        try:
            delete_old(self._adapters.folder, path)
        except OSError as error:
            self._on_event(f"generator: old adapters could not be deleted ({error})")

    def answer(self, questions: list[Question]) -> list[Answers]:
        assert self._current is not None, "a version is published first"
        jobs = [
            Job(number, question.token_ids, seed)
            for number, question in enumerate(questions)
            for seed in question.seeds
        ]
        form = RequestForm(self._current.name, self._sampling, self._vocab_size, self._limits.seconds)
        answers: dict[Job, Answer] = {}
        given_up: dict[int, Unanswered] = {}
        while left := [job for job in jobs if job not in answers and job.question not in given_up]:
            lost: Unavailable | None = None
            found = Round(self._client, form).results(left, self._limits.concurrency, self._stop)
            for job, one in zip(left, found, strict=True):
                if isinstance(one, Answer):
                    answers[job] = one
                elif isinstance(one, Unanswered):
                    given_up[job.question] = one
                else:
                    lost = one
            if any(isinstance(one, Answer) for one in found):
                self._patience.progressed()
            if lost is not None:
                self._recover(lost)
        return [
            given_up.get(number) or tuple(answers[job] for job in jobs if job.question == number)
            for number in range(len(questions))
        ]

    def close(self) -> None:
        if self._current is not None:
            with suppress(Unavailable, Refused, UserError):
                self._client.unload(self._current.name)
            self._current = None

    def _identity_of(self, client: Client) -> dict[str, Any]:
        base = client.base()
        try:
            is_raw = takes_logps_before_sampling(client, base.name, self._vocab_size)
        except Refused as error:
            raise _refuses_probe(client, error) from None
        return {
            "generator": "vllm",
            "version": client.version(),
            "model": base.name,
            "dtype": client.dtype(),
            "logprobs": "raw" if is_raw else "processed",
            "sampling": asdict(self._sampling) | {"stop_token_ids": sorted(self._sampling.stop_token_ids)},
        }

    def _check_form(self, tensors: Mapping[str, Tensor]) -> None:
        """Each version has the same tensors as the first one, by name and shape."""
        form = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if self._form and form != self._form:
            name = min(one for one in form.keys() | self._form.keys() if form.get(one) != self._form.get(one))
            raise CheckFailed(
                f"adapter: {name} has shape {form.get(name)}, and {self._form.get(name)} in the version before"
            )
        self._form = form

    def _check_logps(self) -> None:
        if not self._sampling.is_of_policy and self.identity()["logprobs"] != "raw":
            raise CheckFailed(
                f"generator: {self._client.url} gives log-probs of the distribution that is sampled, which at "
                f"temperature {self._sampling.temperature:g} and top_p {self._sampling.top_p:g} is not the policy's: "
                "start it without --logprobs-mode processed_logprobs"
            )

    def _patiently(self, work: Callable[[Client], _Out]) -> _Out:
        """The result, as soon as the server gives one."""
        while True:
            try:
                return self._listening(work)
            except (Unavailable, TooLate) as error:
                self._identity = None
                self._patience.failed(error)

    def _listening(self, work: Callable[[Client], _Out]) -> _Out:
        """The result of requests that another thread sends. This one listens for a stop, at which they are cut off: a
        load may take minutes."""
        under_way = UnderWay()
        try:
            (result,) = in_threads(work, [self._client.within(under_way)], 1, meanwhile=self._stop)
        except BaseException:
            under_way.cut_off()
            raise
        return result

    def _loaded(self, client: Client, version: _Version) -> _Version:
        """The version with its probe; the server answers by it now.

        Raises:
            Unavailable, TooLate: another time it may. GeneratorLost, UserError, CheckFailed: as `load`, or it answers
                by something else than before.
        """
        load(client, version.name, version.path)
        try:
            (logp,) = likeliest(client, version.name, self._vocab_size).logps or ()
        except Refused as error:
            if error.status == 404:  # lost again in between, or another server behind the same address
                raise Unavailable(str(error), status=404) from None
            raise _refuses_probe(client, error) from None
        if version.logp is not None and not abs(logp - version.logp) <= _PROBE_NATS:
            raise CheckFailed(
                f"generator: {client.url} has come back as another one: it gives the likeliest token of a fixed "
                f"prompt {logp:.4g} nats by {version.name}, {version.logp:.4g} before. Start it with the same base "
                "model, dtype and flags"
            )
        return replace(version, logp=logp)

    def _recover(self, lost: Unavailable) -> None:
        """Wait for a server that was lost, and publish again what it answered by: after a start it knows no adapter."""
        self._identity = None
        self._patience.failed(lost)
        current = self._current
        assert current is not None

        def again(client: Client) -> _Version:
            client.check_health()
            return self._loaded(client, current)

        try:
            self._current = self._patiently(again)
            self._check_logps()
        except UserError as error:
            raise _in_another_form(error) from None

    def _forget_others(self, before: _Version | None) -> None:
        """Unload the version before, and what an earlier start of the run has left.

        A name that stays does no harm: it is never asked again, and the server drops the weights itself.
        """
        assert self._current is not None
        current, folder = self._current.name, self._adapters.folder
        others = {before.name} if before is not None else set()

        def forget(client: Client) -> None:
            found = {one.name for one in client.models() if one.root and Path(one.root).parent == folder}
            for name in sorted((others | found) - {current}):
                with suppress(Refused):
                    client.unload(name)

        try:
            self._listening(forget)
        except (Unavailable, CheckFailed, UserError) as error:
            self._on_event(f"generator: {self._client.url} does not forget older adapters ({error})")


def _in_another_form(error: UserError) -> GeneratorLost:
    """Of a server that worked before: the run must save, which it does not for bad input."""
    return GeneratorLost(f"generator: it has come back in another form: {error}")


def _refuses_probe(client: Client, error: Refused) -> CheckFailed:
    return CheckFailed(f"generator: {client.url} refuses a fixed prompt: {error}")
