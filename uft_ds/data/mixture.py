"""The order of the data mixture: which units make up step n.

It depends on (sources, seed, n) only, not on the number of ranks, a restart or skipped steps. A checkpoint therefore
stores only the number of the step.
"""

from __future__ import annotations

import zlib
from bisect import bisect_right
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby
from typing import Any, Protocol, overload

import numpy as np

from uft_ds.data.example import Response, Sequence, Unit
from uft_ds.data.own_answers import OwnAnswers
from uft_ds.data.pool import Pool
from uft_ds.errors import UserError

Knots = tuple[tuple[float, float], ...]
"""A piecewise linear function of the run's progress: (progress, value), progress rising from 0 to 1."""

SHORT_AFTER = "short_after"
"""The key of `Steps.state`."""

_GRID = 4096
"""Number of grid points at which a schedule's share is integrated."""

_TRIES = 8
"""Iterations of the search for the epoch length that gives the requested number of steps. One or two are enough if
all units have equally many responses."""


@dataclass(frozen=True)
class Step:
    """The sequences of one optimiser step over all ranks and micro-batches. The two of a pair are adjacent.

    made: metrics of how the step was made; empty for fixed data.
    """

    index: int
    sequences: tuple[Sequence, ...]
    made: Mapping[str, float] = field(default_factory=dict, compare=False)

    @property
    def responses(self) -> tuple[Response, ...]:
        return tuple(response for sequence in self.sequences for response in sequence.responses)

    @property
    def units(self) -> tuple[Unit, ...]:
        """Single sequences and pairs, which are never divided over micro-batches."""
        numbered = enumerate(self.sequences)
        by_pair = groupby(
            numbered, key=lambda item: ("single", item[0]) if item[1].pair_id is None else item[1].pair_id
        )
        return tuple(tuple(sequence for _, sequence in group) for _, group in by_pair)


@dataclass(frozen=True)
class Portion:
    """How much of a source one epoch of the mixture takes: a number of passes, or a share of all responses."""

    passes: float = 1.0
    share: Knots | None = None


ONE_PASS = Portion()


class MixedSource(Protocol):
    """What the mixture reads of a prepared source. The order is drawn from the seed and `seed_name`."""

    @property
    def seed_name(self) -> str: ...
    @property
    def selection(self) -> Pool: ...
    @property
    def portion(self) -> Portion: ...


@dataclass(frozen=True)
class _Draw:
    """How an epoch draws units from a source.

    num_units: units of the source. taken: units that an epoch takes, as a ratio of integers (numerator, denominator).
    density: the relative number of units along the epoch; None is constant.
    """

    seeds: tuple[int, int]
    num_units: int
    taken: tuple[int, int]
    density: Knots | None


class Steps(Seq[Step]):
    """All steps of a run over fixed data, as a `StepSource`. A step is built on request, without earlier steps."""

    def __init__(
        self,
        pools: Seq[Pool],
        order: Callable[[int], tuple[np.ndarray, np.ndarray]],
        block_starts: list[int],
        step_starts: np.ndarray,
        short_after: frozenset[int] = frozenset(),
    ) -> None:
        """
        Args:
            order: returns (source, unit) of each unit of a block, [units] each. A block is an epoch.
            block_starts: the number of units before each block.
            step_starts: [steps + 1], the number of units before each step, then the total.
            short_after: see `plan_steps`.
        """
        # Two blocks: a step may begin in one epoch and end in the next.
        self._pools, self._order = pools, lru_cache(maxsize=2)(order)
        self._block_starts, self._step_starts, self._short_after = block_starts, step_starts, short_after

    def __len__(self) -> int:
        return len(self._step_starts) - 1

    @overload
    def __getitem__(self, index: int) -> Step: ...
    @overload
    def __getitem__(self, index: slice) -> Seq[Step]: ...
    def __getitem__(self, index: int | slice) -> Step | Seq[Step]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self.step_of(index, lambda source, unit, pair_id: self._pools[source].unit(unit, pair_id))

    def step_of(self, n: int, unit_of: Callable[[int, int, int], Unit]) -> Step:
        """Step n, of whose units the sequences come from `unit_of(source, unit, pair_id)`, called in order."""
        index = range(len(self))[n]
        sequences: list[Sequence] = []
        pair_id = 0
        for source, number in self.drawn(index):
            unit = unit_of(source, number, pair_id)
            # A unit may hold several pairs, or none: no two pairs of a step have one id.
            pair_id += max(1, len({sequence.pair_id for sequence in unit if sequence.pair_id is not None}))
            sequences += unit
        return Step(index, tuple(sequences))

    def step(self, n: int) -> Step:
        """Step n, counted from 0."""
        return self[n]

    @property
    def ended(self) -> str:
        """Empty: fixed data ends with its last step."""
        return ""

    def accept(self, n: int, answers: OwnAnswers | None) -> Mapping[str, float]:
        """Nothing: fixed data is what it is. See `data.source.StepSource`."""
        return {}

    def drawn(self, n: int) -> list[tuple[int, int]]:
        """(source, unit) of each unit of step n, in order."""
        n = range(len(self))[n]
        return [self._drawn_at(position) for position in range(self._step_starts[n], self._step_starts[n + 1])]

    def starts(self, count: int) -> list[int]:
        """The number of units before each of the first `count` steps, and after the last of them."""
        return [int(start) for start in self._step_starts[: count + 1]]

    def num_responses(self, first: int = 0) -> int:
        """The number of responses in the steps from step `first` on."""
        total = 0
        bounds = zip(self._block_starts, [*self._block_starts[1:], int(self._step_starts[-1])], strict=True)
        for block, (start, end) in enumerate(bounds):
            begin, until = max(start, int(self._step_starts[first])), min(end, int(self._step_starts[-1]))
            if begin < until:
                counts = _counts(self._order(block), [pool.responses_U for pool in self._pools])
                total += int(counts[begin - start : until - start].sum())
        return total

    def state(self) -> Mapping[str, Any]:
        """All that a restart needs besides the number of the step: after which epochs a step is short, if any is."""
        return {SHORT_AFTER: sorted(self._short_after)} if self._short_after else {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Accept the state of the same plan; the number of the step is known elsewhere.

        Raises:
            UserError: the state is from another kind of source, or from another plan.
        """
        if dict(state) != self.state():
            raise UserError(
                f"the checkpoint holds the state of another source of steps ({dict(state)}), where this one has "
                f"{self.state()}: resume with the recipe that the run began with"
            )

    def _drawn_at(self, position: int) -> tuple[int, int]:
        block = bisect_right(self._block_starts, position) - 1
        source_K, unit_K = self._order(block)
        place = position - self._block_starts[block]
        return int(source_K[place]), int(unit_K[place])


def plan_steps(
    sources: Seq[MixedSource],
    *,
    seed: int,
    examples_per_step: int,
    epochs: int,
    steps: int | None,
    short_after: frozenset[int] = frozenset(),
) -> Steps:
    """All steps of a run. A step takes whole units in mixed order until it holds `examples_per_step` responses or more.

    With `steps`, epochs are repeated as often as needed. Otherwise the run has `epochs` epochs, and the last step
    holds the remaining units.

    Args:
        short_after: numbers of epochs after which a step ends with the units that remain, as at the end of a run. A
            run that ended so has taken this short step already when it gets more epochs.
    Raises:
        ValueError: the portions do not make a mixture.
    """
    pools = [source.selection for source in sources]
    amounts, is_scheduled = epoch_amounts(sources), any(len(i.portion.share or ()) > 1 for i in sources)
    responses = [pool.responses_U for pool in pools]
    if is_scheduled:  # a schedule covers the whole run, so the run is one long epoch
        stretch = float(epochs)
        if steps is not None:
            stretch = _stretch_to(steps, examples_per_step, sources, amounts, responses, seed)
        amounts, epochs = [amount * stretch for amount in amounts], 1

    def order(block: int) -> tuple[np.ndarray, np.ndarray]:
        return mixed_order(sources, amounts, seed=seed, epoch=block)

    # Only the counts of responses are read here, not the tokens: planning many steps stays cheap.
    block_starts, step_starts, carried = [0], [0], np.zeros(0, dtype=np.int64)
    block = 0
    # `carried`: responses of the units at an epoch's end that do not fill a step; the next epoch continues that step.
    while (block < epochs) if steps is None else (len(step_starts) <= steps):
        counts = _counts(order(block), responses)
        block_starts.append(block_starts[-1] + len(counts))
        starts = _step_ends(np.concatenate([carried, counts]), examples_per_step) + step_starts[-1]
        carried = np.concatenate([carried, counts])[starts[-1] - step_starts[-1] if len(starts) else 0 :]
        step_starts += starts.tolist()
        block += 1
        if block in short_after and len(carried):
            step_starts.append(block_starts[-1])
            carried = carried[:0]
    if steps is None and len(carried):
        step_starts.append(block_starts[-1])
    elif steps is not None:
        step_starts = step_starts[: steps + 1]
    return Steps(pools, order, block_starts[:-1], np.array(step_starts), short_after)


def in_order(pools: Seq[Pool], examples_per_step: int) -> Steps:
    """Held-out units in the order of their sources, in groups of the size of a training step."""
    counts = [pool.responses_U for pool in pools]
    source_K = np.repeat(np.arange(len(pools)), [len(c) for c in counts])
    unit_K = np.concatenate([np.arange(len(c)) for c in counts] or [np.zeros(0, dtype=np.int64)])
    ends = _step_ends(np.concatenate(counts) if counts else unit_K, examples_per_step).tolist()
    starts = [0, *ends] + ([len(unit_K)] if len(unit_K) > (ends[-1] if ends else 0) else [])
    return Steps(pools, lambda block: (source_K, unit_K), [0], np.array(starts))


def mixed_order(
    sources: Seq[MixedSource], amounts: Seq[float], *, seed: int, epoch: int
) -> tuple[np.ndarray, np.ndarray]:
    """(source, unit) of every unit in one epoch, [units] each. Each source is shuffled and spread over the epoch.

    If an epoch takes n units of a shuffled source, the k-th one is placed at (k + u) / n, with u uniform in [0, 1).
    So every part of the epoch holds about the same shares (or those of the schedule), and a change of one source does
    not change the order of the others. A source that is repeated is shuffled again for each pass.

    Args:
        amounts: responses that an epoch takes from each source.
    """
    places, numbers, units = [], [], []
    for number, draw in enumerate(_draws(sources, amounts)):
        numerator, denominator = draw.taken
        # The total of all epochs so far is rounded, so that the rounding errors of epochs do not add up.
        first, last = ((2 * e * numerator + denominator) // (2 * denominator) for e in (epoch, epoch + 1))
        wanted_K = np.arange(first, last)
        passes = [_one_pass(draw, seed, p) for p in range(first // draw.num_units, -(-last // draw.num_units))]
        offset_K = wanted_K - first // draw.num_units * draw.num_units
        shuffled, jitter = (np.concatenate([one[i] for one in passes] or [np.zeros(0)]) for i in (0, 1))
        place_K = (wanted_K - first + jitter[offset_K]) / max(1, len(wanted_K))
        places.append(place_K if draw.density is None else _along(draw.density, place_K))
        numbers.append(np.full(len(wanted_K), number, dtype=np.int16))
        units.append(shuffled[offset_K].astype(np.int32))
    # Ties of places are broken by source and unit, so that the order is the same on every machine.
    order = np.lexsort((np.concatenate(units), np.concatenate(numbers), np.concatenate(places)))
    return np.concatenate(numbers)[order], np.concatenate(units)[order]


def epoch_amounts(sources: Seq[MixedSource]) -> list[float]:
    """How many responses one epoch of the mixture takes from each source; see `amounts_of`."""
    sizes = [int(source.selection.responses_U.sum()) for source in sources]
    return amounts_of(sizes, [source.portion for source in sources])


def amounts_of(sizes: Seq[int], portions: Seq[Portion]) -> list[float]:
    """How many responses one epoch takes from each source.

    A source with a share gets that share of the total; the other sources are taken by passes. If all sources have
    shares, the epoch ends when the first of them has been used once completely.

    Args:
        sizes: responses of each source.
    Raises:
        ValueError: the shares leave nothing for the other sources, or do not add up to 1.
    """
    shares = [portion.share for portion in portions]
    sums = [sum(value_at(share, at) for share in shares if share) for at in _knots_of(shares)]
    all_shared = all(share is not None for share in shares)
    if all_shared and any(abs(total - 1) > 1e-6 for total in sums):
        raise ValueError(f"the shares of all sources add up to {_worst(sums):g}, expected 1 at every point of the run")
    if not all_shared and max(sums) >= 1 - 1e-9:
        raise ValueError(f"shares of {max(sums):g} in all leave nothing for the sources without one")
    means = [_mean(share) if share else 0.0 for share in shares]
    if all_shared:
        whole = min(size / mean for size, mean in zip(sizes, means, strict=True) if mean > 0)
    else:
        counted = [portion.passes * n for portion, n in zip(portions, sizes, strict=True) if portion.share is None]
        whole = sum(counted) / (1 - sum(means))
    return [
        portion.passes * size if portion.share is None else mean * whole
        for portion, size, mean in zip(portions, sizes, means, strict=True)
    ]


def units_of_epochs(sources: Seq[MixedSource], epochs: int) -> int:
    """The number of units that the first `epochs` epochs take in total; 0 if every source's part is rounded to 0.

    Raises:
        ValueError: the portions do not make a mixture.
    """
    draws = _draws(sources, epoch_amounts(sources))
    return sum((2 * epochs * taken + whole) // (2 * whole) for taken, whole in (draw.taken for draw in draws))


def value_at(knots: Knots, progress: float) -> float:
    """The value of a piecewise linear function at one point."""
    return float(np.interp(progress, [at for at, _ in knots], [value for _, value in knots]))


def _draws(sources: Seq[MixedSource], amounts: Seq[float]) -> list[_Draw]:
    shares = [i.portion.share for i in sources]
    scheduled = any(len(share or ()) > 1 for share in shares)
    rest = tuple((at, 1 - sum(value_at(s, at) for s in shares if s)) for at in _knots_of(shares))
    found = []
    for number, (source, amount) in enumerate(zip(sources, amounts, strict=True)):
        # Two sources may share a name (files in two folders, two selections of one file): the count separates them.
        repeated = [other.seed_name for other in sources[:number]].count(source.seed_name)
        responses_U = source.selection.responses_U
        ratio = (amount / float(responses_U.sum())).as_integer_ratio()
        share = source.portion.share
        density = None if not scheduled else rest if share is None else share
        seeds = (zlib.crc32(source.seed_name.encode()), repeated)
        found.append(_Draw(seeds, len(responses_U), (ratio[0] * len(responses_U), ratio[1]), density))
    return found


def _one_pass(draw: _Draw, seed: int, number: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng([seed, number, *draw.seeds])
    return rng.permutation(draw.num_units), rng.random(draw.num_units)


def _stretch_to(
    steps: int,
    examples_per_step: int,
    sources: Seq[MixedSource],
    amounts: Seq[float],
    responses: Seq[np.ndarray],
    seed: int,
) -> float:
    """The factor for an epoch's amounts so that the epoch holds `steps` steps and hardly more.

    The number of responses in the steps is not known in advance: the last unit of a step may bring more responses than
    are missing, especially among long conversations. So the factor is found by iteration.
    """
    stretch = steps * examples_per_step / sum(amounts)
    for _ in range(_TRIES):
        counts = _counts(mixed_order(sources, [a * stretch for a in amounts], seed=seed, epoch=0), responses)
        found = len(_step_ends(counts, examples_per_step))
        if found == steps:
            return stretch
        stretch *= (steps + 0.5) / (found + 0.5)
    # Close, but not exact: it is better to stop a little before the schedule's end than to begin the schedule again.
    return stretch * (1 + 2 / steps)


def _counts(order: tuple[np.ndarray, np.ndarray], responses: Seq[np.ndarray]) -> np.ndarray:
    """[units]: the number of responses of each unit in an order."""
    source_K, unit_K = order
    counts_K = np.zeros(len(source_K), dtype=np.int64)
    for number, responses_U in enumerate(responses):
        counts_K[source_K == number] = responses_U[unit_K[source_K == number]]
    return counts_K


def _step_ends(counts: np.ndarray, examples_per_step: int) -> np.ndarray:
    """[full steps]: the number of units up to the end of each full step."""
    sums = np.cumsum(counts)
    ends: list[int] = []
    held = 0
    while len(sums) and sums[-1] - held >= examples_per_step:
        ends.append(int(np.searchsorted(sums, held + examples_per_step)) + 1)
        held = int(sums[ends[-1] - 1])
    return np.array(ends, dtype=np.int64)


def _along(density: Knots, place_K: np.ndarray) -> np.ndarray:
    """Map places that are uniform over [0, 1) to places with the given density (by the inverse of its integral)."""
    # The knots are added to the grid, so that the trapezoids follow the density exactly.
    grid = np.union1d(np.linspace(0, 1, _GRID), [at for at, _ in density])
    values = np.interp(grid, [at for at, _ in density], [value for _, value in density])
    summed = np.concatenate([[0.0], np.cumsum(np.diff(grid) * (values[1:] + values[:-1]) / 2)])
    # The inverse is not unique where the density is 0: those grid points are left out.
    rising = np.concatenate([[True], np.diff(summed) > 0])
    return np.interp(place_K, summed[rising] / summed[-1], grid[rising])


def _mean(knots: Knots) -> float:
    ats = [0.0, *(at for at, _ in knots), 1.0]
    values = [value_at(knots, at) for at in ats]
    return float(np.trapezoid(values, ats))


def _knots_of(shares: Seq[Knots | None]) -> list[float]:
    return sorted({0.0, 1.0, *(at for share in shares if share for at, _ in share)})


def _worst(sums: Seq[float]) -> float:
    return max(sums, key=lambda total: abs(total - 1))
