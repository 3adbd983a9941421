"""What every forward of a step needs, and forwards without a graph."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from uft_ds.data.micro_batch import MicroBatch
from uft_ds.data.mixture import Step
from uft_ds.engine.engine import Engine
from uft_ds.known.cache import Known
from uft_ds.objectives.objective import Objective
from uft_ds.record.telemetry import response_rows


@dataclass(frozen=True)
class Method:
    """How a step is computed: by which engine, for which objective, with what is known, in how large micro-batches."""

    engine: Engine
    objective: Objective
    known: Known
    tokens_per_micro_batch: int

    def micro_batches(self, step: Step) -> list[tuple[MicroBatch, bool]]:
        """This rank's part of a step, and for each micro-batch whether the reference must be forwarded."""
        return self.known.micro_batches(self.engine, step, self.tokens_per_micro_batch)


@dataclass(frozen=True)
class Forwarded:
    """The log-probs of a micro-batch without its graph: [responses] each, nats, float64."""

    batch: MicroBatch
    logps_R: Tensor
    reference_logps_R: Tensor | None


def forward(method: Method, step: Step) -> list[Forwarded]:
    """Log-probs of this rank's part of a step, within `engine.evaluating()`."""
    done = []
    for batch, forward_reference in method.micro_batches(step):
        logps_R, forwarded_R = method.engine(batch, with_reference=forward_reference)
        done.append(Forwarded(batch, logps_R, method.known.resolve(batch, forwarded_R)))
    return done


def rows_of(objective: Objective, done: Seq[Forwarded], shifts: Seq[Tensor | None]) -> np.ndarray:
    """The table of this rank's responses."""
    return np.concatenate(
        [
            response_rows(objective, part.batch, part.logps_R, part.reference_logps_R, shifts_R)
            for part, shifts_R in zip(done, shifts, strict=True)
        ]
    )
