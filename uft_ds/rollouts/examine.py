"""Examine a server before a run: does it do what `ServedGenerator` needs, shown by doing it once.

Two small adapters on the first decoder layer are loaded, one after the other: of zeros, by which it must answer as the
base, and of numbers, by which it must not. A server whose layers have other names than the adapter's loads both and
answers by the base.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch import Tensor

from uft_ds.errors import CheckFailed, UserError
from uft_ds.rollouts.adapter_versions import Adapters, check_servable, rank_of, scale_of, write_adapter
from uft_ds.rollouts.answers import Answer, Sampling
from uft_ds.rollouts.gate import RESPONSE_NATS
from uft_ds.rollouts.loading import is_without_route
from uft_ds.rollouts.probe import likeliest, probe_prompt, takes_logps_before_sampling
from uft_ds.rollouts.server import Client, Refused, Served, Server, TooLate, Unavailable, start_command
from uft_ds.streams.adapter_files import PREFIX

_Out = TypeVar("_Out")
_TOKENS = 8
_CHANGED_NATS = {torch.float32: 1e-3, torch.bfloat16: 0.3}
"""What no rounding of a token's log-prob reaches, and an adapter as large as its layer exceeds."""
_FIRST_LAYER = re.compile(r"\.0\.")


@dataclass(frozen=True)
class ServerFinding:
    """One line about a server, with the fields of the doctor's findings.

    state: ok; note: works, with a drawback; problem: a run would fail. remedy: empty if there is nothing to do.
    """

    name: str
    state: Literal["ok", "note", "problem"]
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class Examined:
    """What was found, and the base's answer to a fixed prompt, for a comparison with the log-probs of one's own base.

    answer: None if there was none.
    """

    findings: tuple[ServerFinding, ...]
    prompt: tuple[int, ...] = ()
    answer: Answer | None = None


@dataclass(frozen=True)
class Needed:
    """What a run needs of its server.

    shapes: of the adapter's tensors, by PEFT's names. tokens: the longest prompt and answer together.
    dtype: of the base's computation.
    """

    sampling: Sampling
    adapters: Adapters
    shapes: Mapping[str, tuple[int, ...]]
    vocab_size: int
    tokens: int
    dtype: torch.dtype


def examine_server(server: Server, needed: Needed) -> Examined:
    """Ask the server what a run will ask it. Nothing else may use it meanwhile; all that was loaded is unloaded.

    Raises:
        UserError: the URL is none, or no server takes such an adapter.
    """
    check_servable(needed.adapters.config)
    client = Client(server)
    findings: list[ServerFinding] = []
    answer: Answer | None = None
    try:
        base, found = _base(client, needed)
        findings += found
        start = _start(needed, base.root)
        remedy = f"it needs vLLM 0.22 or newer; {start}"
        answer = _tried("server's answers", remedy, lambda: _likeliest(client, base.name, needed))
        findings.append(_logps(client, base, needed, start))
        findings.append(_adapters(client, base, needed, answer))
    except _Problem as problem:
        findings.append(problem.finding)
    return Examined(tuple(findings), probe_prompt(needed.vocab_size), answer)


def refuse_problems(examined: Examined) -> None:
    """
    Raises:
        UserError: the first problem, with its remedy.
    """
    for one in examined.findings:
        if one.state == "problem":
            raise UserError(f"generator: {one.name}: {one.found}{f'; {one.remedy}' if one.remedy else ''}")


class _Problem(Exception):
    def __init__(self, name: str, found: str, remedy: str) -> None:
        super().__init__(found)
        self.finding = ServerFinding(name, "problem", found, remedy)


def _start(needed: Needed, model: str | None) -> str:
    dtype = str(needed.dtype).removeprefix("torch.")
    return f"start it with: {start_command(model or 'MODEL', rank=rank_of(needed.adapters.config), dtype=dtype)}"


def _tried(name: str, remedy: str, ask: Callable[[], _Out]) -> _Out:
    """What the server says to a question, or the problem."""
    try:
        return ask()
    except (Unavailable, TooLate, Refused, CheckFailed, UserError) as error:
        raise _Problem(name, str(error), remedy) from None


def _likeliest(client: Client, model: str, needed: Needed) -> Answer:
    return likeliest(client, model, needed.vocab_size, tokens=_TOKENS)


def _base(client: Client, needed: Needed) -> tuple[Served, list[ServerFinding]]:
    """The base model, which must have room for the longest prompt and answer."""
    start = _start(needed, None)
    try:
        client.check_health()
    except Unavailable as error:
        raise _Problem("server", f"{client.url}: {error}", start) from None
    version = _tried("server", start, client.version)
    base = _tried("server's model", start, client.base)
    findings = [ServerFinding("server", "ok", f"{client.url}: {f'vLLM {version}' if version else 'version not told'}")]
    if base.max_length is not None and base.max_length < needed.tokens:
        found = f"{base.name} takes {base.max_length} tokens; a prompt and its answer may have {needed.tokens}"
        raise _Problem("server's model", found, f"start it with --max-model-len {needed.tokens} or more")
    length = "" if base.max_length is None else f", {base.max_length} tokens"
    findings.append(ServerFinding("server's model", "ok", f"{base.name}{length}"))
    told, ours = client.dtype(), str(needed.dtype).removeprefix("torch.")
    if told not in (None, ours):
        found, remedy = f"{told}, the run computes in {ours}", f"--dtype {ours}, or the bounds of {told} are too narrow"
        findings.append(ServerFinding("server's dtype", "note", found, remedy))
    return base, findings


def _logps(client: Client, base: Served, needed: Needed, start: str) -> ServerFinding:
    """What log-probs are taken of."""
    ask = partial(takes_logps_before_sampling, client, base.name, needed.vocab_size)
    is_raw, sampling = _tried("server's log-probs", start, ask), needed.sampling
    if is_raw or sampling.is_of_policy:
        return ServerFinding("server's answers", "ok", "token ids and the policy's own log-probs")
    found = f"taken after temperature {sampling.temperature:g} and top_p {sampling.top_p:g}: not the policy's own"
    raise _Problem("server's log-probs", found, "start it without --logprobs-mode processed_logprobs")


def _adapters(client: Client, base: Served, needed: Needed, of_base: Answer) -> ServerFinding:
    """Whether adapters are taken while the server runs, and do what they must."""
    name, rank = "server's adapters", rank_of(needed.adapters.config)
    zeros, numbers = _small_adapters(needed.shapes, needed.adapters.config)
    _, summed, tokens = _apart(_by_adapter(client, needed, base, "zeros", zeros), of_base)
    if not summed <= RESPONSE_NATS[needed.dtype] * math.sqrt(tokens):
        found = f"an adapter of zeros changes the log-probs of {base.name} by {summed:.3g} nats in {tokens} tokens"
        raise _Problem(name, found, "another version of vLLM: this one adds something else")
    by_numbers = _by_adapter(client, needed, base, "numbers", numbers)
    largest, _, _ = _apart(by_numbers, of_base)
    if by_numbers.token_ids == of_base.token_ids and not largest > _CHANGED_NATS[needed.dtype]:
        found = f"an adapter as large as its layer changes nothing: {base.name} answers in its place"
        raise _Problem(name, found, "its layers have other names there; serve the run's own base model")
    return ServerFinding(name, "ok", f"taken while it runs, rank {rank}; zeros change nothing, numbers do")


def _apart(one: Answer, other: Answer) -> tuple[float, float, int]:
    """Largest difference of a token, that of the sum, and the number of tokens: up to the first other token."""
    same = 0
    while same < len(one.token_ids) - 1 and one.token_ids[same] == other.token_ids[same]:
        same += 1
    pairs = list(zip(one.logps or (), other.logps or (), strict=True))[: same + 1]
    differences = [a - b for a, b in pairs]
    return max(map(abs, differences)), abs(math.fsum(differences)), len(pairs)


def _by_adapter(client: Client, needed: Needed, base: Served, what: str, tensors: dict[str, Tensor]) -> Answer:
    """The answer by an adapter that is there for the time of the question."""
    suffix = f"check-{what}-{uuid.uuid4().hex[:8]}"
    path, name = needed.adapters.folder / suffix, needed.adapters.named(suffix)
    start = _start(needed, base.root)
    try:
        write_adapter(path, _with_these_targets(needed.adapters.config, tensors), tensors)
        try:
            client.load(name, path)
        except (Refused, Unavailable) as error:
            remedy = _remedy_of_load(error, path, rank_of(needed.adapters.config), start)
            raise _Problem("server's adapters", f"it does not load one: {error}", remedy) from None
        return _tried("server's adapters", start, lambda: _likeliest(client, name, needed))
    finally:
        with suppress(Unavailable, Refused, UserError):
            client.unload(name)
        shutil.rmtree(path, ignore_errors=True)


def _remedy_of_load(error: Refused | Unavailable, path: Path, rank: int, start: str) -> str:
    if isinstance(error, Refused) and is_without_route(error):
        return f"its environment lacks VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, or it has no --enable-lora; {start}"
    if isinstance(error, Refused) and error.status == 404:
        return f"put {path.parent} on a disk that the server sees under the same path, and may read"
    if "rank" in str(error):
        return f"its --max-lora-rank is below {rank}; {start}"
    return start


def _small_adapters(
    shapes: Mapping[str, tuple[int, ...]], config: bytes
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """For the first decoder layer, or for all if none is called 0: an adapter of zeros, and one whose change of a
    layer's output is about as large as its input."""
    names = [name for name in sorted(shapes) if _FIRST_LAYER.search(name)] or sorted(shapes)
    generator = torch.Generator().manual_seed(0)
    zeros, numbers = {}, {}
    scale = scale_of(config)
    for name in names:
        zeros[name] = torch.zeros(shapes[name])
        # A x has the size of x, and B makes of its `rank` numbers one of that size again.
        size = 1 / math.sqrt(shapes[name][1]) / (scale if ".lora_B." in name else 1.0)
        numbers[name] = torch.randn(shapes[name], generator=generator) * size
    return zeros, numbers


def _with_these_targets(config: bytes, tensors: Mapping[str, Tensor]) -> bytes:
    targets = sorted({name.split(".lora_")[0].removeprefix(PREFIX) for name in tensors})
    return json.dumps(json.loads(config) | {"target_modules": targets}, indent=2, sort_keys=True).encode()
