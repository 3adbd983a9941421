"""Values of frozen streams that a run knows, so that none is computed twice: the reference's log-probs.

With fixed data the reference never changes. What is known at a step is decided by the steps before it and by a snapshot
of the store, taken when the run first starts; never by what other runs add meanwhile. So a restart that is given the
table of a checkpoint as what it knows goes on bit for bit.

A value that was computed in another packing equals a fresh one to rounding, not bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from uft_ds.data.example import Sequence
from uft_ds.data.micro_batch import MicroBatch
from uft_ds.data.mixture import Step
from uft_ds.engine.engine import Engine
from uft_ds.errors import Stopped, UserError
from uft_ds.host.signals import NEVER, Stop
from uft_ds.known.store import LogpTable, ReferenceStore
from uft_ds.objectives.reference import HowReference, is_forwarded_each_time
from uft_ds.streams.stream import logps_of

REFERENCE_TABLE = "reference.safetensors"
"""In a checkpoint's folder."""

REFERENCE = "reference"
"""Name of the stream that log-ratios compare the policy with."""


@dataclass
class StreamValues:
    """What a run knows of one frozen stream: one number for each response.

    how: `none` where nobody asks for it; `cached` where it is forwarded once for each response.
    table: the snapshot, or the table of the checkpoint that is gone on from.
    identity: of the stream, for the store and for the table that checkpoints hold.
    store: where new values go; None on all ranks but one.
    """

    how: HowReference
    table: LogpTable = field(default_factory=dict)
    identity: str = ""
    store: ReferenceStore | None = None
    unstored: LogpTable = field(default_factory=dict)
    forwarded: list[tuple[tuple[bytes, ...], Tensor]] = field(default_factory=list)

    def knows(self, sequence: Sequence) -> bool:
        """Whether no response of a sequence needs the stream's forward."""
        return all(key in self.table for key in sequence.response_keys)

    def unknown(self, step: Step) -> Step:
        """The units of a step that have a response whose value must be forwarded."""
        if self.how != "cached":
            return step if is_forwarded_each_time(self.how) else Step(step.index, ())
        units = (unit for unit in step.units if not all(self.knows(sequence) for sequence in unit))
        return Step(step.index, tuple(sequence for unit in units for sequence in unit))

    def learn(self, engine: Engine, step: Step) -> int:
        """Share what the ranks have forwarded since the last call; see `Known.learn`."""
        unknown = self.unknown(step)
        if self.how != "cached" or not unknown.sequences:
            self.forwarded.clear()
            return len(unknown.responses)
        # The same content may stand in a step twice: the mean of both.
        place = {key: i for i, key in enumerate(dict.fromkeys(k for s in unknown.sequences for k in s.response_keys))}
        # Another stream may have asked for forwards of what this one knows: the last column, which is not read.
        sums = torch.zeros(2, len(place) + 1, dtype=torch.float64)
        for keys, values_R in self.forwarded:
            index_R = torch.tensor([place.get(key, len(place)) for key in keys], dtype=torch.int64)
            values_2R = torch.stack([values_R.cpu(), torch.ones(len(index_R), dtype=torch.float64)])
            sums.index_add_(1, index_R, values_2R)
        self.forwarded.clear()
        totals, counts = engine.sum_over_ranks(sums).tolist()
        found = {key: totals[i] / counts[i] for key, i in place.items()}
        # What is known stays; what is not finite is computed again where it is met again.
        new = {key: value for key, value in found.items() if math.isfinite(value) and key not in self.table}
        self.table |= new
        if self.store is not None:
            self.unstored |= new
        return len(unknown.responses)

    def flush(self) -> str | None:
        """Put what is new into the store; see `Known.flush`."""
        if self.store is None:
            return None
        store, table, self.unstored = self.store, self.unstored, {}
        try:
            store.write(table)
        except OSError as error:
            self.store = None
            return f"the reference cache {store.folder} cannot be written ({error})"
        return None


class Known:
    """Values of frozen streams by (identity of the stream, response): says which must be forwarded, and hands them out.

    Each stream has one table, by its name; a stream of another identity has another store. All ranks hold the same
    tables and call the same methods in the same order.
    """

    def __init__(self, streams: Mapping[str, StreamValues]) -> None:
        """
        Args:
            streams: by name; the reference's among them.
        Raises:
            ValueError: it is not.
        """
        if REFERENCE not in streams:
            raise ValueError(f"known streams {sorted(streams)}: expected {REFERENCE!r} among them")
        self._streams = dict(streams)
        self._reference = self._streams[REFERENCE]

    @classmethod
    def of_reference(
        cls,
        how: HowReference,
        known: LogpTable | None = None,
        *,
        identity: str = "",
        store: ReferenceStore | None = None,
    ) -> Known:
        """The reference alone; see `StreamValues`."""
        return cls({REFERENCE: StreamValues(how, dict(known or {}), identity, store)})

    @property
    def num_known(self) -> int:
        """Responses whose reference is known."""
        return len(self._reference.table)

    def known(self, key: bytes, stream: str = REFERENCE) -> float:
        """A response's value: of the reference its log-prob, nats, float64."""
        return self._streams[stream].table[key]

    def values(self, batch: MicroBatch, stream: str = REFERENCE) -> Tensor:
        """What is known of each response of a micro-batch: [responses], float64, on its device.

        Raises:
            KeyError: a response is not known.
        """
        table = self._streams[stream].table
        values = [table[key] for key in batch.response_keys]
        return torch.tensor(values, dtype=torch.float64, device=batch.scores_R.device)

    def table(self, stream: str = REFERENCE) -> tuple[LogpTable, str]:
        """All that the run knows of a stream, copied, and its identity: with it, a restart goes on bit for bit."""
        of = self._streams[stream]
        return dict(of.table), of.identity

    def has(self, key: bytes, stream: str = REFERENCE) -> bool:
        """Whether a response is known, by its name."""
        return key in self._streams[stream].table

    def knows(self, sequence: Sequence, stream: str = REFERENCE) -> bool:
        """Whether no response of a sequence needs the stream's forward."""
        return self._streams[stream].knows(sequence)

    def unknown(self, step: Step, stream: str = REFERENCE) -> Step:
        """The units of a step that have a response whose value must be forwarded."""
        return self._streams[stream].unknown(step)

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

    def resolve(self, batch: MicroBatch, forwarded_R: Tensor | None, stream: str = REFERENCE) -> Tensor | None:
        """A stream's values of a micro-batch: as forwarded, which is noted for `learn`, else as known.

        Returns:
            [responses], of the reference nats, float64; None where nobody needs them.
        """
        of = self._streams[stream]
        if forwarded_R is not None:
            if of.how == "cached":
                of.forwarded.append((batch.response_keys, forwarded_R))
            return forwarded_R
        return None if of.how == "none" else self.values(batch, stream)

    def learn(self, engine: Engine, step: Step) -> int:
        """Share what the ranks have forwarded since the last call: part of `step`. Every rank must call it.

        Returns:
            responses of the step whose reference was forwarded, over all ranks.
        """
        return {name: of.learn(engine, step) for name, of in self._streams.items()}[REFERENCE]

    @contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """If the block raises, entries that were added inside it are removed: a resumed run learns them again."""
        before = {name: len(of.table) for name, of in self._streams.items()}
        try:
            yield
        except BaseException:
            for name, of in self._streams.items():
                of.forwarded.clear()
                while len(of.table) > before[name]:
                    of.table.popitem()
            raise

    def flush(self) -> str | None:
        """Put what is new into the stores. One that cannot be written is left alone from then on.

        Returns:
            what went wrong, once, on the rank that has the stores.
        """
        problems = [problem for of in self._streams.values() if (problem := of.flush()) is not None]
        return "; ".join(problems) or None

    def forget(self, stream: str = REFERENCE) -> None:
        """Drop a stream's snapshot: it did not stand a check against the stream itself."""
        self._streams[stream].table = {}


def fill(
    engine: Engine,
    cache: Known,
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
