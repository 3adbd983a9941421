"""The check before the first step of a policy that starts from an adapter: its log-ratios are those of the adapter."""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

import torch

from uft_ds.data.example import Sequence
from uft_ds.data.mixture import Step
from uft_ds.engine.engine import Engine
from uft_ds.errors import CheckFailed
from uft_ds.export.agreement import MAX_RELATIVE_ERROR
from uft_ds.known.cache import STORED_ROUNDING_NATS
from uft_ds.objectives.reference import POLICY_STREAM, REFERENCE_STREAM
from uft_ds.streams.stream import logps_of
from uft_ds.training.forwarding import streams_of


@dataclass(frozen=True)
class StartFound:
    """Comparison of the engine's log-ratios with the expected ones; nats, root mean squares over responses.

    rounding: what rounding alone may make of the error.
    """

    num_responses: int
    size: float
    error: float
    rounding: float

    @property
    def summary(self) -> str:
        return (
            f"the log-ratios of start.adapter are {self.size:.3g} nats (root mean square of {self.num_responses} "
            f"responses), {self.error:.2g} from what PEFT and Hugging Face compute of it"
        )

    @property
    def is_below_rounding(self) -> bool:
        """Whether the adapter changes so little that no adapter at all would agree as well."""
        return self.size <= MAX_RELATIVE_ERROR * self.size + self.rounding

    @property
    def agrees(self) -> bool:
        # `not a <= b` for a NaN
        return self.error <= MAX_RELATIVE_ERROR * self.size + self.rounding


def check_starts_as_adapter(
    engine: Engine,
    sequences: Seq[Sequence],
    expected: Seq[float],
    *,
    tokens_per_micro_batch: int,
    dtype: torch.dtype,
) -> StartFound:
    """Refuse to start unless policy and reference differ by what the adapter changes. Every rank must call it.

    Args:
        expected: the log-ratio of each response, in their order, nats, computed without the engine.
    Returns:
        the same result on every rank.
    Raises:
        CheckFailed: on every rank.
    """
    keys = [key for sequence in sequences for key in sequence.response_keys]
    own: dict[bytes, float] = {}
    with engine.evaluating():
        for batch in engine.micro_batches(Step(0, tuple(map(_without_pair, sequences))), tokens_per_micro_batch):
            logps = logps_of(engine(batch, streams_of(engine, with_reference=True)), batch)
            ratios = (logps[POLICY_STREAM] - logps[REFERENCE_STREAM]).tolist()
            own |= dict(zip(batch.response_keys, ratios, strict=True))
    found = {key: ratio for of_rank in engine.gather_over_data(own) for key, ratio in of_rank.items()}
    tokens = [response.num_tokens for sequence in sequences for response in sequence.responses]
    result = StartFound(
        len(keys),
        size=_root_mean_square(expected),
        error=_root_mean_square([found[key] - value for key, value in zip(keys, expected, strict=True)]),
        rounding=STORED_ROUNDING_NATS[dtype] * math.sqrt(sum(tokens) / len(tokens)),
    )
    if not result.agrees:
        raise CheckFailed(
            f"start.adapter: before the first step its log-ratios to the base are {result.error:.3g} nats from what "
            f"PEFT and Hugging Face compute of them, which are {result.size:.3g} nats (root mean squares of "
            f"{result.num_responses} responses; allowed {MAX_RELATIVE_ERROR:.0%} and {result.rounding:.2g} nats for "
            "rounding): the policy is not this adapter on this base"
        )
    return result


def _without_pair(sequence: Sequence) -> Sequence:
    """A sample may end within a pair; its sides are forwarded alone."""
    return replace(sequence, responses=tuple(replace(response, pair_id=None) for response in sequence.responses))


def _root_mean_square(values: Seq[float]) -> float:
    return math.sqrt(sum(value * value for value in values) / len(values))
