"""Bin packing for `packing`: assign units to as few bins as possible, then make the bins' costs equal.

There are U units with known tokens and costs, and B bins of one capacity, one bin for each rank and micro-step. The
result is deterministic (fixed seeds, whole-number sums), so every rank computes the same assignment by itself.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np

Assignment = np.ndarray
"""[units], int64: the bin of each unit."""


@dataclass(frozen=True, eq=False)
class Units:
    """The units of a step: a unit is never divided over micro-batches.

    members: indices of each unit's sequences.
    tokens_U: [units], int64.
    costs_U: [units], whole numbers. Their sums do not depend on the order of addition, so ranks on different
        processors agree.
    """

    members: list[list[int]]
    tokens_U: np.ndarray
    costs_U: np.ndarray


def fewest_micro_steps(lengths_of_units: Seq[int], tokens_per_micro_batch: int, world_size: int) -> int:
    """A lower bound on the number of micro-steps; at least 1.

    It is the largest of these lower bounds on the number of bins of capacity C, divided by the ranks:

        L2      Martello and Toth 1990. Each unit above C/2 needs its own bin. Small units of at least a tokens share a
                bin with a unit of at most C - a tokens, or need new bins. With a = 0: all tokens / C.
        u^(k)   Fekete and Schepers 2001, for k = 2 to 8. A bin holds at most k units longer than C/(k + 1).
    """
    lengths_U = np.sort(np.asarray(lengths_of_units, dtype=np.int64))
    capacity = tokens_per_micro_batch
    bins = max(_l2_bound(lengths_U, capacity), *(_share_bound(lengths_U, capacity, k) for k in range(2, 9)))
    return max(1, _ceil_div(bins, world_size))


def _l2_bound(lengths_U: np.ndarray, capacity: int) -> int:
    """The bound L2, in bins. lengths_U: [units], in ascending order."""
    up_to_U1 = np.concatenate([[0], lengths_U.cumsum()])
    half = int(np.searchsorted(lengths_U, capacity // 2, side="right"))
    num_large = len(lengths_U) - half
    # Only lengths that occur can be the best threshold a; 0 gives the bound by the total of the tokens.
    smallest_A = np.unique(np.concatenate([[0], lengths_U[:half]]))
    small_A = up_to_U1[half] - up_to_U1[np.searchsorted(lengths_U, smallest_A, side="left")]
    end_A = np.maximum(np.searchsorted(lengths_U, capacity - smallest_A, side="right"), half)
    room_A = (end_A - half) * capacity - (up_to_U1[end_A] - up_to_U1[half])
    return num_large + max(0, _ceil_div(int((small_A - room_A).max()), capacity))


def _share_bound(lengths_U: np.ndarray, capacity: int, k: int) -> int:
    """The bound u^(k), in bins.

    A length counts as floor((k + 1) length / C) / k bins; where the division has no remainder, as length / C bins.
    """
    parts_U, rest_U = np.divmod((k + 1) * lengths_U, capacity)
    return _ceil_div(int(np.where(rest_U == 0, k * lengths_U, parts_U * capacity).sum()), k * capacity)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def sums(values_U: np.ndarray, bin_of_U: Assignment, num_bins: int) -> np.ndarray:
    """[bins], int64: the sum of the values in each bin."""
    sums_B = np.zeros(num_bins, dtype=np.int64)
    np.add.at(sums_B, bin_of_U, values_U)
    return sums_B


# ---- first, find an assignment that fits


_RESTARTS = 4
"""Random restarts of the last heuristic. On 3,000 steps with real lengths, its first try saved 29 steps a micro-step
and a restart saved 3 more; 4 steps kept one micro-step more than the lower bound. Where the heuristic fails, the
restarts take most of the time."""


def assign(units: Units, num_bins: int, capacity: int) -> Assignment | None:
    """An assignment within the capacity, or None if none was found. Cheap heuristics are tried first."""
    tokens_U, costs_U = units.tokens_U, units.costs_U
    assigned = _one_by_one(tokens_U, costs_U, num_bins, capacity, to_the_lightest=True)
    if assigned is None:
        assigned = _one_by_one(tokens_U, tokens_U, num_bins, capacity, to_the_lightest=False)
    if assigned is None:
        rng = np.random.default_rng(0)  # one seed for all ranks: they must find the same assignment
        for restart in range(_RESTARTS):
            # The first try keeps the true order; restarts order by lengths changed by up to 5, 10 and 15 percent.
            changed_U = tokens_U * rng.integers(100 - 5 * restart, 101 + 5 * restart, size=len(tokens_U))
            assigned = _bin_by_bin(tokens_U, np.argsort(-changed_U, kind="stable"), num_bins, capacity)
            if assigned is not None:
                break
    return assigned


def _one_by_one(
    tokens_U: np.ndarray, weights_U: np.ndarray, num_bins: int, capacity: int, *, to_the_lightest: bool
) -> Assignment | None:
    """Place the heaviest unit first, into the lightest or the heaviest bin that has room.

    The lightest bin gives equal bins (worst fit); the heaviest bin fits more units (best fit).
    """
    bin_of_U = np.zeros(len(tokens_U), dtype=np.int64)
    room_B = np.full(num_bins, capacity)
    key_B = np.zeros(num_bins, dtype=np.int64)
    sign = 1 if to_the_lightest else -1
    never = np.iinfo(np.int64).max
    for unit in np.argsort(-weights_U, kind="stable").tolist():
        chosen = int(np.where(room_B >= tokens_U[unit], key_B, never).argmin())
        if room_B[chosen] < tokens_U[unit]:
            return None
        bin_of_U[unit] = chosen
        room_B[chosen] -= tokens_U[unit]
        key_B[chosen] += sign * weights_U[unit]
    return bin_of_U


def _bin_by_bin(tokens_U: np.ndarray, order_U: np.ndarray, num_bins: int, capacity: int) -> Assignment | None:
    """Fill one bin at a time: the first remaining unit, then a subset of the others.

    The subset brings the bin to at least its share of the remaining tokens.
    """
    bin_of_U = np.zeros(len(tokens_U), dtype=np.int64)
    left = order_U.tolist()
    lengths = tokens_U.tolist()
    total = sum(lengths)
    for number in range(num_bins):
        if not left:
            break
        first, *others = left
        share = _ceil_div(total, num_bins - number)
        beside = _subset([lengths[u] for u in others], share - lengths[first], capacity - lengths[first])
        taken = {first, *(others[i] for i in beside)}
        bin_of_U[list(taken)] = number
        total -= sum(lengths[u] for u in taken)
        left = [u for u in left if u not in taken]
    return None if left else bin_of_U


def _subset(lengths: Seq[int], least: int, most: int) -> list[int]:
    """Indices of lengths that sum to `least`..`most`, early ones preferred; else to the largest sum below `least`.

    Subset sum by dynamic programming; the bits of one integer are the sums that can be reached.
    """
    within = (1 << (most + 1)) - 1
    reached = [1]  # bit s of reached[i]: a subset of the first i lengths has the sum s
    for length in lengths:
        if least <= 0 or reached[-1] >> least:
            break
        reached.append((reached[-1] | reached[-1] << length) & within)
    enough = reached[-1] >> max(least, 0)
    # The smallest sum that is enough (its lowest bit), or the largest of all (the highest bit).
    total = max(least, 0) + (enough & -enough).bit_length() - 1 if enough else reached[-1].bit_length() - 1
    chosen = []
    for i in range(len(reached) - 2, -1, -1):  # back through the table: length i was needed if the sum was not there
        if not reached[i] >> total & 1:
            chosen.append(i)
            total -= lengths[i]
    return chosen


# ---- then make the bins' costs equal


_EVEN_ENOUGH = 1e-3
"""Share of a bin's cost: smaller differences are not worth a search."""

_PARTNERS = 64
"""Bins that are tried for a swap with one bin, at most. On 64 ranks, trying all of them is 33% slower and reduces the
waiting time by 0.02%."""


class _Bins:
    """An assignment that is changed by swaps.

    There are X = U + B items: the units, then one empty item in each bin, of no tokens and no cost. A swap with an
    empty item moves a unit.
    """

    def __init__(self, units: Units, bin_of_U: Assignment, num_bins: int, capacity: int) -> None:
        nothing_B = np.zeros(num_bins, dtype=np.int64)
        self.num_units, self.capacity = len(bin_of_U), capacity
        self.tokens_X = np.concatenate([units.tokens_U, nothing_B])
        self.costs_X = np.concatenate([units.costs_U, nothing_B])
        self.bin_of_X = np.concatenate([bin_of_U, np.arange(num_bins)])
        self.load_B = sums(self.tokens_X, self.bin_of_X, num_bins)
        self.cost_B = sums(self.costs_X, self.bin_of_X, num_bins)

    def swaps(self, number: int, partners: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """All swaps of an item of bin `number` with an item of a partner bin.

        Returns:
            own, theirs: the items of the bin and of its partners. Then, for each swap, [own, theirs]: the cost by
            which it lowers the bin, and whether both bins stay within the capacity.
        """
        is_partner_B = np.zeros(len(self.cost_B), dtype=bool)
        is_partner_B[partners] = True
        (own,) = np.nonzero(self.bin_of_X == number)
        (theirs,) = np.nonzero(is_partner_B[self.bin_of_X])
        tokens = self.tokens_X[own][:, None] - self.tokens_X[theirs]
        room_theirs = self.capacity - self.load_B[self.bin_of_X[theirs]]
        fits = (tokens <= room_theirs) & (tokens >= self.load_B[number] - self.capacity)
        return own, theirs, self.costs_X[own][:, None] - self.costs_X[theirs], fits

    def swap(self, one: int, other: int) -> None:
        """Exchange two items; an empty item stays in its bin."""
        bins = self.bin_of_X[[one, other]]
        for thing, (source, target) in ((one, bins), (other, bins[::-1])):
            if thing < self.num_units:
                self.bin_of_X[thing] = target
            for sums_B, values_X in ((self.load_B, self.tokens_X), (self.cost_B, self.costs_X)):
                sums_B[source] -= values_X[thing]
                sums_B[target] += values_X[thing]


def even_out(units: Units, bin_of_U: Assignment, micro_steps: int, world_size: int, capacity: int) -> Assignment:
    """Make all bins cost the same where possible; otherwise the bins of each micro-step.

    A unit that costs more than the mean bin makes all other ranks wait, unless the other bins of its micro-step are
    filled to the same cost.
    """
    bins = _Bins(units, bin_of_U, micro_steps * world_size, capacity)
    left = np.arange(micro_steps * world_size)
    while len(left):
        _lower_the_costliest(bins, left)
        # Bins are taken by their largest unit, not by their cost: large units that meet in one micro-step raise one
        # level instead of several.
        largest_B = np.zeros(len(bins.cost_B), dtype=np.int64)
        np.maximum.at(largest_B, bins.bin_of_X, bins.costs_X)
        left = left[np.lexsort((-bins.cost_B[left], -largest_B[left]))]
        beside, left = left[:world_size], left[world_size:]
        level = int(bins.cost_B[beside].max())
        for number in beside.tolist():
            _raise_to(bins, number, level, left)
    return bins.bin_of_X[: bins.num_units]


def _lower_the_costliest(bins: _Bins, among: np.ndarray) -> None:
    """Swap items between the costliest bin and others until no swap lowers it; then take the next costliest.

    The best swap leaves the costlier of its two bins as cheap as possible.
    """
    cost_B, left = bins.cost_B, among
    for _ in range(8 * len(among)):
        left = left[np.argsort(-cost_B[left], kind="stable")]
        top, others = int(left[0]), left[1:]
        # No swap can lower the costliest bin below the mean.
        if cost_B[top] <= (1 + _EVEN_ENOUGH) * cost_B[left].mean():
            return
        own, theirs, taken, fits = bins.swaps(top, others[-_PARTNERS:])
        costlier = np.maximum(cost_B[top] - taken, cost_B[bins.bin_of_X[theirs]] + taken)
        costlier[~fits] = cost_B[top]  # never below the present cost, so never chosen
        i, j = divmod(int(costlier.argmin()), len(theirs))
        if costlier[i, j] < cost_B[top]:
            bins.swap(int(own[i]), int(theirs[j]))
        else:
            left = others


def _raise_to(bins: _Bins, number: int, level: int, from_bins: np.ndarray) -> None:
    """Raise a bin's cost towards `level`, never above it, by the largest swaps with other bins."""
    while len(from_bins) and (gap := level - int(bins.cost_B[number])) > _EVEN_ENOUGH * level:
        own, theirs, taken, fits = bins.swaps(number, from_bins[:_PARTNERS])
        gained = np.where(fits & (taken < 0) & (-taken <= gap), bins.costs_X[theirs] - taken, 0)
        i, j = divmod(int(gained.argmax()), len(theirs))
        if not gained[i, j]:
            return
        bins.swap(int(own[i]), int(theirs[j]))


def schedule(cost_B: np.ndarray, world_size: int) -> np.ndarray:
    """[micro-steps, ranks]: the bin of each rank in each micro-step.

    Bins of similar cost share a micro-step, the costliest first, so that a lack of memory shows at once. In each
    micro-step, the rank with the lowest cost over all other micro-steps gets the costliest bin.
    """
    bin_MW = np.argsort(-cost_B, kind="stable").reshape(-1, world_size)
    totals_W = cost_B[bin_MW].sum(0)
    for _ in range(4):  # each pass uses the totals of the one before; stop when nothing changes
        before = totals_W.copy()
        for bins_W in bin_MW:
            bins_by_cost_W = bins_W[np.argsort(-cost_B[bins_W], kind="stable")]
            totals_W -= cost_B[bins_W]
            bins_W[np.argsort(totals_W, kind="stable")] = bins_by_cost_W
            totals_W += cost_B[bins_W]
        if np.array_equal(before, totals_W):
            break
    return bin_MW
