"""The order of the mixture: which sequences make up step n.

It depends on (sources, seed, n) only: not on the number of ranks, a restart, or what was skipped.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import chain, count

import numpy as np

from uft_ds.data.example import Response, Sequence


@dataclass(frozen=True)
class Step:
    """The sequences of one optimiser step, over all ranks and micro-batches."""

    index: int
    sequences: tuple[Sequence, ...]

    @property
    def responses(self) -> tuple[Response, ...]:
        return tuple(response for sequence in self.sequences for response in sequence.responses)


def mixed_order(sizes: Seq[int], labels: Seq[str], *, seed: int, epoch: int) -> list[tuple[int, int]]:
    """(source, index) of every sequence in one epoch: each source shuffled, all spread evenly.

    The k-th sequence of a shuffled source of n stands at (k + u) / n, u uniform in [0, 1): every stretch of
    the epoch holds about the same shares, and changing one source leaves the others' order as it is.
    """
    placed = []
    for source, (size, label) in enumerate(zip(sizes, labels, strict=True)):
        repeated = list(labels[:source]).count(label)
        rng = np.random.default_rng([seed, epoch, zlib.crc32(label.encode()), repeated])
        shuffled = rng.permutation(size)
        places = (np.arange(size) + rng.random(size)) / size
        placed += [(float(place), source, int(index)) for place, index in zip(places, shuffled, strict=True)]
    return [(source, index) for _, source, index in sorted(placed)]


def plan_steps(
    sources: Seq[Seq[Sequence]],
    labels: Seq[str],
    *,
    seed: int,
    examples_per_step: int,
    epochs: int,
    steps: int | None,
) -> tuple[Step, ...]:
    """All steps of a run: whole sequences in mixed order until a step holds `examples_per_step` responses.

    With `steps`, epochs follow one another as often as needed; otherwise `epochs` of them are run and the last
    step holds what is left.
    """
    sizes = [len(source) for source in sources]
    all_epochs = range(epochs) if steps is None else count()
    stream = chain.from_iterable(
        (sources[s][i] for s, i in mixed_order(sizes, labels, seed=seed, epoch=epoch)) for epoch in all_epochs
    )
    plan: list[Step] = []
    for group in _groups(stream, examples_per_step):
        if steps is not None and len(plan) == steps:
            break
        plan.append(Step(len(plan), tuple(group)))
    return tuple(plan)


def in_order(sequences: Seq[Sequence], examples_per_step: int) -> tuple[Step, ...]:
    """Held-out sequences in groups of the training step's size, in their own order."""
    return tuple(Step(i, tuple(group)) for i, group in enumerate(_groups(iter(sequences), examples_per_step)))


def _groups(stream: Iterator[Sequence], examples_per_step: int) -> Iterator[list[Sequence]]:
    group: list[Sequence] = []
    held = 0
    for sequence in stream:
        group.append(sequence)
        held += len(sequence.responses)
        if held >= examples_per_step:
            yield group
            group, held = [], 0
    if group:
        yield group
