"""The method (engine, objective, cache) that every forward of a step uses, and forwards without a graph."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from uft_ds.data.micro_batch import MicroBatch
from uft_ds.data.mixture import Step
from uft_ds.engine.engine import Engine
from uft_ds.known.cache import Known
from uft_ds.objectives.baselines import Baselines, Compared
from uft_ds.objectives.implicit_reward import response_sums
from uft_ds.objectives.objective import Objective, log_ratios_of
from uft_ds.objectives.reference import POLICY_STREAM, REFERENCE_STREAM, REWARD_STREAM
from uft_ds.record.telemetry import response_rows
from uft_ds.streams.stream import Output, Stream, logps_of


@dataclass(frozen=True)
class Method:
    """How a step is computed: the engine, the objective, the known reference values and the micro-batches' size.

    policy_is_reference: whether the two still compute the same, as before the first update of a run whose policy
    starts as the reference.
    """

    engine: Engine
    objective: Objective
    known: Known
    tokens_per_micro_batch: int
    policy_is_reference: bool = False

    def streams(self, *, with_reference: bool) -> tuple[Stream, ...]:
        """The streams that a step forwards: of a reward model one, else the policy and, if asked for, the reference."""
        if self.objective.reward == "head":
            return (self.engine.streams[REWARD_STREAM],)
        return streams_of(self.engine, with_reference=with_reference)

    def micro_batches(self, step: Step) -> list[tuple[MicroBatch, bool]]:
        """This rank's part of a step, and for each micro-batch whether the reference must be forwarded."""
        return self.known.micro_batches(self.engine, step, self.tokens_per_micro_batch)

    def rounding(self, logps: Mapping[str, Tensor]) -> float:
        """How far rounding may move a forwarded micro-batch's log-ratios, nats per square root of a response's tokens.

        It is 0 unless the reference's log-probs were stored: in one forward both streams round alike.
        """
        return 0.0 if REFERENCE_STREAM in logps or self.policy_is_reference else self.known.rounding


@dataclass(frozen=True)
class Forwarded:
    """The results of a forwarded micro-batch, without its graph: [responses] each, float64, summed over tokens.

    logps: by stream, nats; of a reward head its values. entropy_R: the policy's entropy, nats. top1_R: the number of
    tokens that are the policy's most probable ones. Both are None if the forward computed no statistics. rounding: see
    `Method.rounding`. baselines: what its rewards are compared with; None: with the scores, without a shift.
    """

    batch: MicroBatch
    logps: Mapping[str, Tensor]
    entropy_R: Tensor | None = None
    top1_R: Tensor | None = None
    rounding: float = 0.0
    baselines: Baselines | None = None

    @classmethod
    def of(cls, batch: MicroBatch, logps: Mapping[str, Tensor], trained: Output, rounding: float) -> Forwarded:
        """Keep the results of one forward.

        Args:
            logps: by stream, with or without a graph.
            trained: the trained stream's output in the same forward.
            rounding: see `Method.rounding`.
        """
        entropy_R, top1_R = (
            None if of_N is None else response_sums(of_N, batch) for of_N in (trained.entropy_N, trained.is_top1_N)
        )
        return cls(
            batch,
            {name: logps_R.detach() for name, logps_R in logps.items()},
            entropy_R=entropy_R,
            top1_R=top1_R,
            rounding=rounding,
        )


def streams_of(engine: Engine, *, with_reference: bool) -> tuple[Stream, ...]:
    """The streams that a training step forwards."""
    names = (POLICY_STREAM, REFERENCE_STREAM) if with_reference else (POLICY_STREAM,)
    return tuple(engine.streams[name] for name in names)


def with_known(method: Method, batch: MicroBatch, logps: dict[str, Tensor]) -> dict[str, Tensor]:
    """The forwarded log-probs, completed by the reference's known ones: [responses] each, nats, float64.

    While the policy is the reference, its own log-probs stand for stored ones: the check before the first step has
    found them equal, and they lack the rounding of another packing. So log-ratios are exactly 0 then, whether the cache
    is warm or cold.
    """
    reference_logps_R = method.known.resolve(batch, logps.get(REFERENCE_STREAM))
    if reference_logps_R is None:
        return logps
    if REFERENCE_STREAM not in logps and method.policy_is_reference:
        reference_logps_R = logps[POLICY_STREAM].detach()
    return logps | {REFERENCE_STREAM: reference_logps_R}


def baselines_of(
    objective: Objective, batch: MicroBatch, logps: Mapping[str, Tensor], compared: Compared | None
) -> Baselines | None:
    """What the rewards of a forwarded micro-batch are compared with.

    Args:
        logps: by stream, [responses], nats, with or without a graph; with the reference if `compared` is not None.
    """
    if compared is None:
        return None
    policy_R, reference_R = logps[POLICY_STREAM].detach(), logps[REFERENCE_STREAM].detach()
    return compared.with_log_ratios(log_ratios_of(objective, batch, policy_R, reference_R))


def forward(method: Method, step: Step, *, with_statistics: bool) -> list[Forwarded]:
    """Forward this rank's part of a step; the caller must be within `engine.evaluating()`.

    Args:
        with_statistics: whether the policy's entropy and most probable tokens are computed, which only metrics need.
    """
    engine, done = method.engine, []
    for batch, forward_reference in method.micro_batches(step):
        streams = method.streams(with_reference=forward_reference)
        outputs = engine(batch, streams, with_statistics=with_statistics)
        live = logps_of(outputs, batch)
        logps = with_known(method, batch, live)
        done.append(Forwarded.of(batch, logps, outputs[method.objective.trained_stream], method.rounding(live)))
    return done


_SHOWN = (POLICY_STREAM, REFERENCE_STREAM, REWARD_STREAM)
"""The streams of which a table of responses has columns."""


def rows_of(objective: Objective, done: Seq[Forwarded]) -> np.ndarray:
    """The table of this rank's responses, with one row per response; see `record.telemetry.ROW`."""
    columns = [
        (
            *(part.logps.get(name) for name in _SHOWN),
            part.entropy_R,
            part.top1_R,
            *((None,) * 3 if part.baselines is None else part.baselines.columns),
        )
        for part in done
    ]
    host = iter(to_host([column_R for of_part in columns for column_R in of_part]))
    tables = []
    for part in done:
        found = {name: next(host) for name in _SHOWN}
        logps = {name: column_R for name, column_R in found.items() if column_R is not None}
        entropy_R, top1_R = next(host), next(host)
        compared = [column_R for column_R in (next(host) for _ in range(3)) if column_R is not None]
        tables.append(
            response_rows(
                objective,
                part.batch,
                logps,
                Baselines(*compared) if compared else None,
                entropy_R=entropy_R,
                top1_R=top1_R,
                rounding=part.rounding,
            )
        )
    return np.concatenate(tables)


def to_host(columns: Seq[Tensor | None]) -> list[Tensor | None]:
    """The same columns in host memory, [responses] each, float64: one transfer for all, which waits for the device."""
    there = [column_R for column_R in columns if column_R is not None]
    joined = torch.cat([column_R.double() for column_R in there]).cpu()
    parts = iter(joined.split([len(column_R) for column_R in there]))
    return [None if column_R is None else next(parts) for column_R in columns]
