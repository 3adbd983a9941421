"""A stream: one way through the shared frozen weights, and what comes out at its end.

N supervised tokens, R responses of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from uft_ds.data.micro_batch import MicroBatch
from uft_ds.objectives.implicit_reward import response_sums


@dataclass(frozen=True)
class Stream:
    """One way through the shared weights: the base, an adapter or none, and a head.

    name: "policy", "reference", "reward", ...
    adapter: PEFT's name of it; None: the bare base.
    trained: whether it carries a gradient. Never one adapter for two trained streams.
    head: "tokens": log-probs of the supervised tokens; "scalar": one value at each response's last token.
    """

    name: str
    adapter: str | None
    trained: bool = False
    head: Literal["tokens", "scalar"] = "tokens"

    def __post_init__(self) -> None:
        if self.trained and self.adapter is None:
            raise ValueError(f"stream {self.name!r}: the bare base is frozen and cannot be trained")


POLICY_ADAPTER, REFERENCE_ADAPTER = "default", "reference"
"""PEFT's names of the policy's adapter, which PEFT chose, and of a reference's frozen one beside it."""

POLICY = Stream("policy", POLICY_ADAPTER, trained=True)
"""What every run trains."""

BARE_BASE = Stream("reference", None)
"""The reference of a run that starts from fresh adapters."""


class Output(NamedTuple):
    """What one stream makes of a micro-batch; of a tokens head all but `values_R`, of a scalar head that alone.

    A trained stream's log-probs or values carry the gradient.
    """

    token_logps_N: Tensor | None = None
    """Log-probs of the supervised tokens, float32, nats."""
    entropy_N: Tensor | None = None
    """Of the distribution that predicts the token, over the vocabulary, float32, nats; without gradient."""
    is_top1_N: Tensor | None = None
    """No token of the vocabulary is more probable than the target."""
    values_R: Tensor | None = None
    """A number for each response, float32."""


def trained_first(streams: Iterable[Stream]) -> tuple[Stream, ...]:
    """The order in which streams stand in a visit and in a matmul.

    Raises:
        ValueError: no stream, two of one name, or two trained ones with one adapter.
    """
    ordered = tuple(sorted(streams, key=lambda stream: not stream.trained))
    names = [stream.name for stream in ordered]
    adapters = [stream.adapter for stream in ordered if stream.trained]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"streams {names}: expected one or more with distinct names")
    if len(set(adapters)) != len(adapters):
        raise ValueError(f"streams {names}: two trained streams have one adapter; each needs its own")
    return ordered


def logps_of(outputs: Mapping[str, Output], micro_batch: MicroBatch) -> dict[str, Tensor]:
    """log pi(y|x) of each response, by the name of the stream: [responses], nats, float64."""
    return {
        name: response_sums(output.token_logps_N, micro_batch)
        for name, output in outputs.items()
        if output.token_logps_N is not None
    }
