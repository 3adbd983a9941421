"""Streams (one pass through the shared frozen weights with a given adapter and head) and their outputs.

N supervised tokens, R responses of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from uft_ds.data.micro_batch import MicroBatch
from uft_ds.objectives.implicit_reward import response_sums
from uft_ds.objectives.reference import POLICY_STREAM, REFERENCE_STREAM, REWARD_STREAM


@dataclass(frozen=True)
class Stream:
    """One path through the shared weights: the base, an adapter or none, and a head.

    name: "policy", "reference", "reward", ...
    adapter: PEFT's name of the adapter; None: the bare base.
    trained: whether the stream carries a gradient. Two trained streams must not share an adapter. Without an adapter it
    trains the base itself.
    head: "tokens": log-probs of the supervised tokens; "scalar": one value at each response's last token.
    """

    name: str
    adapter: str | None
    trained: bool = False
    head: Literal["tokens", "scalar"] = "tokens"


POLICY_ADAPTER, REFERENCE_ADAPTER, REWARD_ADAPTER = "default", "reference", "reward"
"""PEFT's names of the policy's adapter (PEFT's default) and of the frozen adapters of a reference and a reward model.
"""

POLICY = Stream(POLICY_STREAM, POLICY_ADAPTER, trained=True)
"""The stream that every run trains, unless it trains a reward model."""

REWARD = Stream(REWARD_STREAM, POLICY_ADAPTER, trained=True, head="scalar")
"""The one stream that a reward model trains: the run's adapter and a scalar head."""

SCORING = Stream(REWARD_STREAM, REWARD_ADAPTER, head="scalar")
"""A reward model that scores the policy's answers: a frozen adapter of its own on the policy's base, and its head."""

WHOLE_POLICY = Stream(POLICY_STREAM, None, trained=True)
"""The policy of a run that trains all parameters."""

BARE_BASE = Stream(REFERENCE_STREAM, None)
"""The reference of a run that starts from fresh adapters."""


class Output(NamedTuple):
    """The output of one stream for a micro-batch.

    A tokens head fills all fields except `values_R`, the entropy and `is_top1_N` only if statistics are asked for; a
    scalar head fills only `values_R`. The log-probs or values of a trained stream carry the gradient.
    """

    token_logps_N: Tensor | None = None
    """Log-probs of the supervised tokens, float32, nats."""
    entropy_N: Tensor | None = None
    """Entropy of the distribution over the vocabulary that predicts the token, float32, nats; without gradient."""
    is_top1_N: Tensor | None = None
    """Whether no token of the vocabulary is more probable than the target."""
    values_R: Tensor | None = None
    """One number for each response, float32."""


def trained_first(streams: Iterable[Stream]) -> tuple[Stream, ...]:
    """The order of streams in a forward and in a matmul: trained ones first.

    Raises:
        ValueError: there is no stream, two have one name, or two trained ones share an adapter.
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
    """What each stream says of each response: log pi(y|x), nats, float64; of a scalar head its value, float32.

    Returns:
        [responses] each, by the name of the stream.
    """
    of_tokens = {name: output.token_logps_N for name, output in outputs.items() if output.token_logps_N is not None}
    of_responses = {name: output.values_R for name, output in outputs.items() if output.values_R is not None}
    return of_responses | {name: response_sums(logps_N, micro_batch) for name, logps_N in of_tokens.items()}
