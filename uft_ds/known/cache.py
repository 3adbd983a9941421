"""The values of frozen streams that a run knows, such as the reference's log-probs, so that none is computed twice.

With fixed data the reference never changes. The values known at a step depend only on the steps before it and on a
snapshot of the store, taken when the run first starts; values that other runs add later are not read. So a run that is
resumed with a checkpoint's table continues bit for bit.

A value that was computed in another packing equals a fresh one up to rounding, not bit for bit.
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
from uft_ds.errors import CheckFailed, Stopped, UserError
from uft_ds.host.signals import NEVER, Stop
from uft_ds.known.store import LogpTable, ReferenceStore
from uft_ds.objectives.reference import REFERENCE_STREAM, HowReference, is_forwarded_each_time
from uft_ds.streams.stream import logps_of

STORED_ROUNDING_NATS = {torch.float32: 1e-5, torch.bfloat16: 0.12}
"""How far a stored log-prob may be from a fresh one by rounding in another packing, in nats; to be multiplied by the
square root of the response's tokens. The largest that was measured on a 135M model and real rows: 7e-6 and 0.12."""

REFERENCE_TABLE = "reference.safetensors"
"""Name of the table's file in a checkpoint's folder."""


@dataclass
class StreamValues:
    """The known values of one frozen stream: one number for each response.

    how: `none` if no loss needs the stream; `cached` if it is forwarded once for each response.
    table: the known values; at the start the store's snapshot, or the table of the checkpoint that a run resumes from.
    identity: the stream's identity, recorded in the store and in checkpoints.
    rounding: how far a known value may be from a fresh one, per square root of the response's tokens.
    store: receives new values; None on all ranks but one.
    unstored: new values that are not in the store yet.
    forwarded: this rank's values since the last `learn`: (response keys, [responses]).
    """

    how: HowReference
    table: LogpTable = field(default_factory=dict)
    identity: str = ""
    rounding: float = 0.0
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
        # The same content may occur twice in a step; its value is then the mean of both.
        place = {key: i for i, key in enumerate(dict.fromkeys(k for s in unknown.sequences for k in s.response_keys))}
        # Another stream may have required a forward of responses that are known here. They go to the last column, which
        # is not read.
        sums = torch.zeros(2, len(place) + 1, dtype=torch.float64)
        if self.forwarded:
            places = [place.get(key, len(place)) for keys, _ in self.forwarded for key in keys]
            # One transfer for all micro-batches: each would wait for the device.
            values_R = torch.cat([values_R for _, values_R in self.forwarded]).cpu().double()
            index_R = torch.tensor(places, dtype=torch.int64)
            sums.index_add_(1, index_R, torch.stack([values_R, torch.ones_like(values_R)]))
        self.forwarded.clear()
        totals, counts = engine.sum_over_ranks(sums).tolist()
        found = {key: totals[i] / counts[i] for key, i in place.items()}
        # Known values never change. A value that is not finite is not kept, so it is computed again when needed.
        new = {key: value for key, value in found.items() if math.isfinite(value) and key not in self.table}
        self.table |= new
        if self.store is not None:
            self.unstored |= new
        return len(unknown.responses)

    def flush(self) -> str | None:
        """Write new values to the store; see `Known.flush`."""
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
    """The known values of all frozen streams: decides which responses must be forwarded, and returns known values.

    Each stream has one table, by its name; a stream of another identity has another store. All ranks hold the same
    tables and call the same methods in the same order.

    A recipe has one frozen stream, the reference. It is the default of each method's argument `stream`, for which no
    recipe gives another value yet.
    """

    def __init__(self, streams: Mapping[str, StreamValues]) -> None:
        """
        Args:
            streams: by name; the reference must be among them.
        Raises:
            ValueError: the reference is not among them.
        """
        if REFERENCE_STREAM not in streams:
            raise ValueError(f"known streams {sorted(streams)}: expected {REFERENCE_STREAM!r} among them")
        self._streams = dict(streams)
        self._reference = self._streams[REFERENCE_STREAM]

    @classmethod
    def of_reference(
        cls,
        how: HowReference,
        known: LogpTable | None = None,
        *,
        identity: str = "",
        rounding: float = 0.0,
        store: ReferenceStore | None = None,
    ) -> Known:
        """An instance that holds only the reference; for the arguments see `StreamValues`."""
        return cls({REFERENCE_STREAM: StreamValues(how, dict(known or {}), identity, rounding, store)})

    @property
    def rounding(self) -> float:
        """How far a known log-prob of the reference may be from a fresh one, nats per square root of its tokens."""
        return self._reference.rounding

    @property
    def num_known(self) -> int:
        """The number of responses whose reference is known."""
        return len(self._reference.table)

    def known(self, key: bytes, stream: str = REFERENCE_STREAM) -> float:
        """A response's value, float64; for the reference its log-prob in nats."""
        return self._streams[stream].table[key]

    def values(self, batch: MicroBatch, stream: str = REFERENCE_STREAM) -> Tensor:
        """The known value of each response of a micro-batch: [responses], float64, on the micro-batch's device.

        Raises:
            KeyError: a response is not known.
        """
        table = self._streams[stream].table
        values = [table[key] for key in batch.response_keys]
        # Made on the host and copied: `torch.tensor(..., device=...)` would wait for the forward that is queued.
        return torch.tensor(values, dtype=torch.float64).to(batch.scores_R.device, non_blocking=True)

    def table(self, stream: str = REFERENCE_STREAM) -> tuple[LogpTable, str]:
        """A copy of a stream's table, and the stream's identity. A run resumed with both continues bit for bit."""
        of = self._streams[stream]
        return dict(of.table), of.identity

    def has(self, key: bytes, stream: str = REFERENCE_STREAM) -> bool:
        """Whether a response is known, by its key."""
        return key in self._streams[stream].table

    def unknown(self, step: Step, stream: str = REFERENCE_STREAM) -> Step:
        """The units of a step that have a response whose value must be forwarded."""
        return self._streams[stream].unknown(step)

    def micro_batches(self, engine: Engine, step: Step, tokens_per_micro_batch: int) -> list[tuple[MicroBatch, bool]]:
        """This rank's part of a step, and for each micro-batch whether the reference must be forwarded.

        Fully known units are packed separately from the others, so that every rank forwards the reference in the same
        micro-steps. Under ZeRO-3 a forward contains collectives.
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

    def resolve(self, batch: MicroBatch, forwarded_R: Tensor | None, stream: str = REFERENCE_STREAM) -> Tensor | None:
        """A stream's values for a micro-batch: the forwarded ones, which are noted for `learn`, or else the known ones.

        Returns:
            [responses], float64, for the reference in nats; None if no loss needs them.
        """
        of = self._streams[stream]
        if forwarded_R is not None:
            if of.how == "cached":
                of.forwarded.append((batch.response_keys, forwarded_R))
            return forwarded_R
        return None if of.how == "none" else self.values(batch, stream)

    def learn(self, engine: Engine, step: Step) -> int:
        """Exchange the values that the ranks have forwarded since the last call, and add them to the tables.

        Every rank must call it.

        Args:
            step: the step that the forwarded responses belong to.
        Returns:
            the number of the step's responses whose reference was forwarded, over all ranks.
        """
        return {name: of.learn(engine, step) for name, of in self._streams.items()}[REFERENCE_STREAM]

    @contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """If the block raises, entries added inside it are removed; a resumed run computes them again identically."""
        before = {name: len(of.table) for name, of in self._streams.items()}
        try:
            yield
        except BaseException:
            for name, of in self._streams.items():
                of.forwarded.clear()
                while len(of.table) > before[name]:
                    of.table.popitem()  # a dict removes its newest entry
            raise

    def flush(self) -> str | None:
        """Write new values to the stores. A store that cannot be written is not tried again.

        Returns:
            what went wrong, on the rank that has the stores and only once for each store; else None.
        """
        problems = [problem for of in self._streams.values() if (problem := of.flush()) is not None]
        return "; ".join(problems) or None

    def forget(self, stream: str = REFERENCE_STREAM) -> None:
        """Discard a stream's snapshot, because a check against the stream's own forward failed."""
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
    needs_all: bool = False,
) -> None:
    """Forward only the reference over all responses that are not known yet, and store the values along the way.

    Every rank must call it, with the same groups.

    Args:
        flush_every: the number of groups after which new values are written to the store.
        on_group: called after each group with the number of its responses, and of those that were computed.
        needs_all: whether a response without a finite value is an error. It is not kept otherwise.
    Raises:
        UserError: the store cannot be written.
        CheckFailed: on every rank; names the response that has none.
        Stopped: between two groups; the values found so far are stored.
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
                    outputs = engine(batch, [engine.streams[REFERENCE_STREAM]])
                    cache.resolve(batch, logps_of(outputs, batch)[REFERENCE_STREAM])
            computed = cache.learn(engine, group)
            if needs_all and (missing := _without_value(cache, group)):
                flush()
                raise CheckFailed(
                    f"{missing[0]}: the reference's log-prob is not finite, and no step computes it again: leave the "
                    "row out, or take another model.base"
                )
            if number % flush_every == 0:
                flush()
            on_group(len(group.responses), computed)
            try:
                stop.check()
            except Stopped:
                flush()
                raise
    flush()


def _without_value(cache: Known, group: Step) -> list[str]:
    """Origins of a group's responses that are not known."""
    return [
        response.origin
        for sequence in group.sequences
        for key, response in zip(sequence.response_keys, sequence.responses, strict=True)
        if not cache.has(key)
    ]
