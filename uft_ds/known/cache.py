"""The reference's log-probs that a run knows, so that none is computed twice.

With fixed data the reference never changes. What is known at a step is decided by the steps before it and by a snapshot
of the store, taken when the run first starts; never by what other runs add meanwhile. So a restart that is given the
table of a checkpoint as what it knows goes on bit for bit.

A value that was computed in another packing equals a fresh one to rounding, not bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from uft_ds.data.example import Sequence
from uft_ds.data.micro_batch import MicroBatch
from uft_ds.data.mixture import Step
from uft_ds.engine.engine import Engine
from uft_ds.errors import Stopped, UserError
from uft_ds.host.signals import NEVER, Stop
from uft_ds.known.store import LogpTable, ReferenceStore
from uft_ds.objectives.implicit_reward import logps_of

REFERENCE_TABLE = "reference.safetensors"
"""In a checkpoint's folder."""

Mode = Literal["unneeded", "live", "remembered"]
"""No reference at all; forwarded each time; forwarded once."""


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
        self._forwarded: list[tuple[tuple[bytes, ...], Tensor]] = []

    @property
    def num_known(self) -> int:
        return len(self._known)

    def known(self, key: bytes) -> float:
        """A response's log-prob under the reference, nats, float64."""
        return self._known[key]

    def table(self) -> tuple[LogpTable, str]:
        """All that the run knows, copied, and of which reference: with it, a restart goes on bit for bit."""
        return dict(self._known), self._identity

    def has(self, key: bytes) -> bool:
        """Whether a response is known, by its name."""
        return key in self._known

    def knows(self, sequence: Sequence) -> bool:
        """Whether no response of a sequence needs the reference's forward."""
        return all(key in self._known for key in sequence.response_keys)

    def unknown(self, step: Step) -> Step:
        """The units of a step that have a response whose reference must be forwarded."""
        if self._mode != "remembered":
            return step if self._mode == "live" else Step(step.index, ())
        units = (unit for unit in step.units if not all(self.knows(sequence) for sequence in unit))
        return Step(step.index, tuple(sequence for unit in units for sequence in unit))

    def micro_batches(self, engine: Engine, step: Step, tokens_per_micro_batch: int) -> list[tuple[MicroBatch, bool]]:
        """This rank's part of a step, and for each micro-batch whether the reference must be forwarded.

        Sequences that are wholly known are packed apart from the others, so every rank forwards the reference in the
        same micro-steps.
        """
        unknown = self.unknown(step)
        chosen = {id(sequence) for sequence in unknown.sequences}
        known = Step(step.index, tuple(sequence for sequence in step.sequences if id(sequence) not in chosen))
        return [
            (batch, part is unknown)
            for part in (unknown, known)
            if part.sequences
            for batch in engine.micro_batches(part, tokens_per_micro_batch)
        ]

    def resolve(self, batch: MicroBatch, forwarded_R: Tensor | None) -> Tensor | None:
        """The reference's log-probs of a micro-batch: as forwarded, which is noted for `learn`, else as known.

        Returns:
            [responses], nats, float64; None where no objective needs them.
        """
        if forwarded_R is not None:
            if self._mode == "remembered":
                self._forwarded.append((batch.response_keys, forwarded_R))
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
        unknown = self.unknown(step)
        if self._mode != "remembered" or not unknown.sequences:
            return len(unknown.responses)
        # The same content may stand in a step twice: the mean of both.
        place = {key: i for i, key in enumerate(dict.fromkeys(k for s in unknown.sequences for k in s.response_keys))}
        sums = torch.zeros(2, len(place), dtype=torch.float64)
        for keys, logps_R in self._forwarded:
            index_R = torch.tensor([place[key] for key in keys], dtype=torch.int64)
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
        return len(unknown.responses)

    @contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """What is learnt within the block is forgotten where it is left early: whoever goes on does all of it again."""
        before = len(self._known)
        try:
            yield
        except BaseException:
            self._forwarded.clear()
            while len(self._known) > before:
                self._known.popitem()
            raise

    def flush(self) -> str | None:
        """Put what is new into the store. One that cannot be written is left alone from then on.

        Returns:
            what went wrong, once, on the rank that has the store.
        """
        if self._store is None:
            return None
        store, table, self._unstored = self._store, self._unstored, {}
        try:
            store.write(table)
        except OSError as error:
            self._store = None
            return f"the reference cache {store.folder} cannot be written ({error})"
        return None

    def forget(self) -> None:
        """Drop the snapshot: it did not stand a check against the reference itself."""
        self._known = {}


def fill(
    engine: Engine,
    cache: ReferenceCache,
    groups: Iterable[Step],
    tokens_per_micro_batch: int,
    *,
    flush_every: int,
    on_group: Callable[[int, int], None] = lambda visited, computed: None,
    stop: Stop = NEVER,
) -> None:
    """Forward the reference alone over everything that is not known yet; what is found is stored on the way.

    Args:
        on_group: called after each group with the number of its responses, and of those that had to be computed.
    Raises:
        UserError: the store cannot be written.
        Stopped: between two groups; what has been found is stored.
    """

    def flush() -> None:
        problem = cache.flush()
        if problem is not None:
            raise UserError(f"reference.cache_dir: {problem}; what was stored before is kept")

    with engine.evaluating():
        for number, group in enumerate(groups, start=1):
            unknown = cache.unknown(group)
            if unknown.sequences:
                for batch in engine.micro_batches(unknown, tokens_per_micro_batch):
                    outputs = engine(batch, [engine.streams["reference"]])
                    cache.resolve(batch, logps_of(outputs, batch)["reference"])
            computed = cache.learn(engine, group)
            if number % flush_every == 0:
                flush()
            on_group(len(group.responses), computed)
            try:
                stop.check()
            except Stopped:
                flush()
                raise
    flush()
