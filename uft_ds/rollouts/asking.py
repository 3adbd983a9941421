"""One round of requests to a server: everything that has no answer yet, several at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from uft_ds.errors import CheckFailed
from uft_ds.host.web import UnderWay
from uft_ds.rollouts.answers import Answer, Sampling, Unanswered
from uft_ds.rollouts.completion import Aborted, answer_in, request_body
from uft_ds.rollouts.loading import is_without_route
from uft_ds.rollouts.server import Client, Refused, TooLate, Unavailable
from uft_ds.scoring.threads import in_threads

_TRIES = 2
"""How often a request is sent that is not answered in time, with the same seed."""

Found = Answer | Unanswered | Unavailable


@dataclass(frozen=True)
class Job:
    """One answer that is wanted. question: its number; answers of one question are used together or not at all."""

    question: int
    prompt: tuple[int, ...]
    seed: int


@dataclass(frozen=True)
class RequestForm:
    """What all requests of a round share. model: the adapter's name. seconds: the longest that one may take."""

    model: str
    sampling: Sampling
    vocab_size: int
    seconds: float


class Round:
    """Asks until everything has an answer, or the server fails."""

    def __init__(self, client: Client, form: RequestForm) -> None:
        self._under_way = UnderWay()
        self._client, self._form = client.within(self._under_way), form
        self._lost: Unavailable | None = None
        self._given_up: dict[int, Unanswered] = {}

    def results(self, jobs: Sequence[Job], concurrency: int, stop: Callable[[], None]) -> list[Found]:
        """What became of each job. After the server has failed once, the rest is not sent.

        Nothing is under way when this returns. If it raises, what was is cut off.

        Raises:
            CheckFailed: a reply cannot be used. UserError: the key is not accepted. Whatever `stop` raises.
        """
        try:
            return in_threads(self._one, jobs, concurrency, on_error=self._under_way.cut_off, meanwhile=stop)
        except BaseException:
            self._under_way.cut_off()
            raise

    def _one(self, job: Job) -> Found:
        for _ in range(_TRIES):
            if self._lost is not None:
                return self._lost
            if job.question in self._given_up:
                return self._given_up[job.question]
            try:
                return self._answer(job)
            except TooLate:
                try:
                    self._client.check_health()
                except Unavailable as error:
                    self._lost = error
                    return error
            except Unavailable as error:
                self._lost = error
                return error
        reason = f"no answer within {self._form.seconds:g} s, asked {_TRIES} times with the same seed"
        return self._given_up.setdefault(job.question, Unanswered(reason))

    def _answer(self, job: Job) -> Answer:
        form = self._form
        body = request_body(form.model, job.prompt, seed=job.seed, sampling=form.sampling)
        try:
            reply = self._client.complete(body, seconds=form.seconds)
            return answer_in(
                reply, model=form.model, prompt=job.prompt, sampling=form.sampling, vocab_size=form.vocab_size
            )
        except Aborted as error:
            raise Unavailable(str(error)) from None
        except Refused as error:
            if error.status == 404 and not is_without_route(error):
                # It has been started again, and knows no adapter.
                raise Unavailable(str(error), status=404) from None
            raise CheckFailed(
                f"generator: {self._client.url} refuses a prompt of {len(job.prompt)} tokens with at most "
                f"{form.sampling.max_new_tokens} of an answer: {error}"
            ) from None
