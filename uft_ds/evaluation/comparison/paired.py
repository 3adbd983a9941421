"""Two models on the same items: the mean difference, its bootstrap interval, and a sign-flip test.

Where few differences are distinct, both draw from the exact distribution of the resampled mean without resampling item
by item: a bootstrap sample of n items is a multinomial draw over the distinct differences, and flipping signs at random
is a binomial draw for each distinct size. Most metrics are 0 or 1, so 12,000 items have three distinct differences.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES, LEVEL = 10_000, 0.95
"""Efron and Tibshirani (1993), chapter 13: percentile intervals need some 1,000; 10,000 steadies their second digit."""
_DRAWS_AT_ONCE = 2**22
"""Numbers of one piece of the draws: 32 MiB."""


@dataclass(frozen=True)
class Difference:
    """Of two means over the same items.

    low, high: of the 95% bootstrap interval. p: two-sided, of the sign-flip test; never 0, as it counts the observed
    arrangement itself (Phipson and Smyth 2010). by_chance: the mean size of the difference in that test, where each
    item's sign is drawn by a coin.
    """

    mean: float
    low: float
    high: float
    p: float
    items: int
    by_chance: float


def paired_difference(ours_I: NDArray[np.float64], theirs_I: NDArray[np.float64], *, seed: int = 0) -> Difference:
    """The mean of ours minus theirs over the same items.

    Args:
        ours_I, theirs_I: [items], the same item at the same place; at least one.

    Returns:
        with fewer than two items the interval is the whole line and p is 1: nothing is known about the spread.
    """
    if ours_I.shape != theirs_I.shape or ours_I.ndim != 1 or not len(ours_I):
        raise ValueError(f"expected two lists of the same items: {ours_I.shape} and {theirs_I.shape}")
    differences_I = ours_I - theirs_I
    mean, items = float(differences_I.mean()), len(differences_I)
    if items < 2:
        return Difference(mean, -np.inf, np.inf, 1.0, items, abs(mean))
    random = np.random.default_rng(seed)
    low, high = np.quantile(_resampled_means(differences_I, random), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    p, by_chance = _sign_flips(differences_I, random)
    return Difference(mean, float(low), float(high), p, items, by_chance)


def holm(p_values: list[float]) -> list[float]:
    """Holm's step-down adjustment (1979): p-values of several tests, such that 0.05 holds for all of them together."""
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    adjusted, greatest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        greatest = max(greatest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = greatest
    return adjusted


def _resampled_means(differences_I: NDArray[np.float64], random: np.random.Generator) -> NDArray[np.float64]:
    values_K, counts_K = np.unique(differences_I, return_counts=True)
    shares_K = counts_K / counts_K.sum()
    means: list[NDArray[np.float64]] = []
    items = len(differences_I)
    if 4 * len(values_K) > items:  # of 12,000 distinct ones multinomial draws took 33 s, drawn places 2 s
        for draws in _pieces(items):
            means.append(differences_I[random.integers(0, items, size=(draws, items))].mean(1))
        return np.concatenate(means)
    for draws in _pieces(len(values_K)):
        means.append(random.multinomial(len(differences_I), shares_K, size=draws) @ values_K / items)
    return np.concatenate(means)


def _sign_flips(differences_I: NDArray[np.float64], random: np.random.Generator) -> tuple[float, float]:
    """Where each difference's sign is drawn by a coin: how often the mean is as far from 0, and how far it is."""
    sizes_K, counts_K = np.unique(np.abs(differences_I), return_counts=True)
    observed = abs(float(differences_I.sum()))
    as_far, distance = 0, 0.0
    for draws in _pieces(len(sizes_K)):
        sums = (2 * random.binomial(counts_K, 0.5, size=(draws, len(counts_K))) - counts_K) @ sizes_K
        as_far += int((np.abs(sums) >= observed * (1 - 1e-9)).sum())
        distance += float(np.abs(sums).sum())
    return (as_far + 1) / (RESAMPLES + 1), distance / RESAMPLES / len(differences_I)


def _pieces(distinct: int) -> list[int]:
    most = max(1, _DRAWS_AT_ONCE // distinct)
    return [min(most, RESAMPLES - start) for start in range(0, RESAMPLES, most)]
