"""The reference's log-probs that a run knows, so that none is computed twice.

With fixed data the reference never changes. What is known at a step is decided by the steps before it and by a snapshot
of the store, taken when the run first starts; never by what other runs add meanwhile. So a restart from a checkpoint,
which holds the table, goes on bit for bit.

A value that was computed in another packing equals a fresh one to rounding, not bit for bit.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from uft_ds.data.example import Sequence
from uft_ds.data.mixture import Step
from uft_ds.data.packing import MicroBatch
from uft_ds.training.engine import Engine
from uft_ds.training.reference_store import LogpTable, ReferenceStore, write_table

REFERENCE_TABLE = "reference.safetensors"
"""In a checkpoint's folder."""

Mode = Literal["unneeded", "live", "remembered"]
"""No reference at all; forwarded each time; forwarded once."""

logger = logging.getLogger("uft_ds")


class ReferenceCache:
    """Says of each micro-batch whether the reference must be forwarded, and hands out its log-probs.

    All ranks hold the same table and call the same methods in the same order.
    """

    def __init__(
        self, mode: Mode, known: LogpTable | None = None, *, identity: str = "", store: ReferenceStore | None = None
    ) -> None:
        """
        Args:
            known: the snapshot, or the table of the checkpoint that is gone on from.
            identity: of the reference, for the table that checkpoints hold.
            store: where new values go; None on all ranks but one.
        """
        self._mode = mode
        self._identity = identity
        self._known: LogpTable = dict(known or {})
        self._store = store
        self._unstored: LogpTable = {}
        self._forwarded: list[tuple[MicroBatch, Tensor]] = []

    @property
    def num_known(self) -> int:
        return len(self._known)

    def known(self, key: bytes) -> float:
        """A response's log-prob under the reference, nats, float64."""
        return self._known[key]

    def save(self, folder: Path) -> None:
        """Write all that the run knows: with it, a restart goes on bit for bit."""
        if self._known:
            write_table(folder / REFERENCE_TABLE, self._known, self._identity)

    def knows(self, sequence: Sequence) -> bool:
        """Whether no response of a sequence needs the reference's forward."""
        return all(key in self._known for key in sequence.response_keys)

    def micro_batches(self, engine: Engine, step: Step, tokens_per_micro_batch: int) -> list[tuple[MicroBatch, bool]]:
        """This rank's part of a step, and for each micro-batch whether the reference must be forwarded.

        Sequences that are known are packed apart from those that are not: every rank forwards the reference in the same
        micro-steps, and a known response never rides with one that is not.
        """
        if self._mode != "remembered":
            return [(batch, self._mode == "live") for batch in engine.micro_batches(step, tokens_per_micro_batch)]
        fresh = tuple(sequence for sequence in step.sequences if not self.knows(sequence))
        known = tuple(sequence for sequence in step.sequences if self.knows(sequence))
        return [
            (batch, is_fresh)
            for sequences, is_fresh in ((fresh, True), (known, False))
            if sequences
            for batch in engine.micro_batches(Step(step.index, sequences), tokens_per_micro_batch)
        ]

    def logps(self, batch: MicroBatch, forwarded_R: Tensor | None) -> Tensor | None:
        """The reference's log-probs of a micro-batch: as forwarded, else as known; [responses], nats, float64.

        None where no objective needs them.
        """
        if forwarded_R is not None:
            if self._mode == "remembered":
                self._forwarded.append((batch, forwarded_R))
            return forwarded_R
        if self._mode == "unneeded":
            return None
        values = [self._known[key] for key in batch.response_keys]
        return torch.tensor(values, dtype=torch.float64, device=batch.scores_R.device)

    def learn(self, engine: Engine, step: Step) -> int:
        """Share what the ranks have forwarded since the last call: part of `step`. Every rank must call it.

        Returns:
            responses of the step whose reference was forwarded, over all ranks.
        """
        if self._mode != "remembered":
            return len(step.responses) if self._mode == "live" else 0
        fresh = [sequence for sequence in step.sequences if not self.knows(sequence)]
        if not fresh:
            return 0
        # The same content may stand in a step twice: the mean of both.
        place = {key: i for i, key in enumerate(dict.fromkeys(k for s in fresh for k in s.response_keys))}
        sums = torch.zeros(2, len(place), dtype=torch.float64)
        for batch, logps_R in self._forwarded:
            index_R = torch.tensor([place[key] for key in batch.response_keys], dtype=torch.int64)
            values_2R = torch.stack([logps_R.cpu(), torch.ones(len(index_R), dtype=torch.float64)])
            sums.index_add_(1, index_R, values_2R)
        self._forwarded.clear()
        totals, counts = engine.sum_over_ranks(sums).tolist()
        found = {key: totals[i] / counts[i] for key, i in place.items()}
        # What is known stays; what is not finite is computed again where it is met again.
        new = {key: value for key, value in found.items() if math.isfinite(value) and key not in self._known}
        self._known |= new
        if self._store is not None:
            self._unstored |= new
        return sum(len(sequence.responses) for sequence in fresh)

    def flush(self) -> None:
        """Put what is new into the store. A store that cannot be written is said once and then left alone."""
        if self._store is None:
            return
        try:
            self._store.write(self._unstored)
        except OSError as error:
            logger.warning("the reference cache cannot be written, the run goes on without: %s", error)
            self._store = None
        self._unstored = {}

    def forget(self) -> None:
        """Drop the snapshot: it did not stand a check against a live reference."""
        self._known = {}
        if self._store is not None:
            self._store.set_all_aside()


def fill(
    engine: Engine,
    cache: ReferenceCache,
    groups: Iterable[Step],
    tokens_per_micro_batch: int,
    *,
    flush_every: int,
    on_group: Callable[[int], None] = lambda computed: None,
) -> int:
    """Forward the reference alone over everything that is not known yet; what is found is stored on the way.

    Args:
        on_group: called after each group with the number of responses it needed.
    Returns:
        responses computed, over all ranks.
    """
    total = 0
    with engine.evaluating():
        for number, group in enumerate(groups, start=1):
            for batch, is_fresh in cache.micro_batches(engine, group, tokens_per_micro_batch):
                if is_fresh:
                    cache.logps(batch, engine.reference_logps(batch))
            computed = cache.learn(engine, group)
            total += computed
            if number % flush_every == 0:
                cache.flush()
            on_group(computed)
    cache.flush()
    return total
