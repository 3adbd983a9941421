"""Intervals and p-values of paired differences, against resampling item by item and against all arrangements."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from uft_ds.evaluation.comparison.paired import RESAMPLES, holm, paired_difference


@pytest.mark.parametrize("is_binary", [True, False])
def test_the_interval_is_that_of_resampled_items(is_binary: bool) -> None:
    """Ends as those of 10,000 samples of 300 items with replacement, within a tenth of the interval's width."""
    random = np.random.default_rng(1)
    ours, theirs = random.random(300), random.random(300)
    if is_binary:
        ours, theirs = (ours < 0.6).astype(float), (theirs < 0.5).astype(float)
    found = paired_difference(ours, theirs)
    chosen = random.integers(0, 300, size=(RESAMPLES, 300))
    low, high = np.quantile((ours - theirs)[chosen].mean(1), [0.025, 0.975])
    assert found.mean == pytest.approx(ours.mean() - theirs.mean())
    assert found.low == pytest.approx(low, abs=0.1 * (high - low))
    assert found.high == pytest.approx(high, abs=0.1 * (high - low))


def test_few_and_many_distinct_differences_give_one_interval() -> None:
    """Rounded to tenths they are drawn by their counts, unrounded item by item."""
    random = np.random.default_rng(4)
    ours, theirs = random.random(400), random.random(400)
    exact = paired_difference(ours - theirs, np.zeros(400))
    rounded = paired_difference((ours - theirs).round(1), np.zeros(400))
    assert rounded.low == pytest.approx(exact.low, abs=0.006)
    assert rounded.high == pytest.approx(exact.high, abs=0.006)


@pytest.mark.parametrize("shift", [0.0, 0.2, 0.6])
def test_p_is_the_share_of_arrangements_as_far_from_zero(shift: float) -> None:
    """Against all 4,096 arrangements of the signs of twelve differences, some of the same size."""
    random = np.random.default_rng(2)
    ours = np.concatenate([random.random(9), [0.5, 0.5, 0.25]]) + shift
    theirs = np.concatenate([random.random(9), [0.0, 0.0, 0.0]])
    differences = ours - theirs
    signs = np.array(list(itertools.product((-1, 1), repeat=12)))
    exact = (np.abs(signs @ differences) >= abs(differences.sum()) * (1 - 1e-9)).mean()
    assert paired_difference(ours, theirs).p == pytest.approx(exact, abs=4 * np.sqrt(exact / RESAMPLES) + 2e-4)


def test_chance_has_the_size_of_all_arrangements() -> None:
    """The mean of |sum of +-d| / 10 over the 1024 arrangements of signs."""
    differences = np.array([1.0, -1.0, 1.0, 0.5, 0.0, 0.0, 0.25, -0.75, 0.0, 1.0])
    sizes = [abs(np.dot(signs, differences)) / 10 for signs in itertools.product((-1, 1), repeat=10)]
    found = paired_difference(differences, np.zeros(10))
    assert found.by_chance == pytest.approx(np.mean(sizes), rel=0.03)  # 10,000 draws: a standard error of 0.8%


def test_equal_models_do_not_differ() -> None:
    """No difference at all: an interval of no width at 0, and a p of 1."""
    same = np.array([0.0, 1.0, 1.0])
    found = paired_difference(same, same)
    assert (found.mean, found.low, found.high, found.p) == (0.0, 0.0, 0.0, 1.0)


def test_the_interval_covers_as_often_as_it_says() -> None:
    """Of 400 experiments with 200 items 95%, within chance; and p is below 0.05 as rarely as it should be."""
    random = np.random.default_rng(3)
    true, covered, rejected = 0.1, 0, 0
    for seed in range(400):
        theirs = (random.random(200) < 0.5).astype(float)
        ours = np.where(random.random(200) < true, 1.0, theirs)  # gains half of `true` on average
        found = paired_difference(ours, theirs, seed=seed)
        covered += found.low <= true / 2 <= found.high
        swapped = random.random(200) < 0.5
        rejected += (
            paired_difference(np.where(swapped, ours, theirs), np.where(swapped, theirs, ours), seed=seed).p < 0.05
        )
    assert 0.91 < covered / 400 < 0.98
    assert rejected / 400 < 0.08


def test_one_item_says_nothing() -> None:
    """The interval is the whole line."""
    found = paired_difference(np.array([1.0]), np.array([0.0]))
    assert (found.mean, found.low, found.high, found.p) == (1.0, -np.inf, np.inf, 1.0)


@pytest.mark.parametrize("shapes", [((2,), (3,)), ((0,), (0,)), ((2, 2), (2, 2))])
def test_lists_of_other_items_are_refused(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    """Two lengths, no items, or no list."""
    with pytest.raises(ValueError, match="expected two lists of the same items"):
        paired_difference(np.zeros(shapes[0]), np.zeros(shapes[1]))


def test_holm_of_an_example_by_hand() -> None:
    """0.01 x 4, 0.02 x 3, 0.03 x 2 and 0.04 x 1, none below the one before it."""
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_lies_between_the_p_value_and_bonferroni(p_values: list[float]) -> None:
    """And keeps the order."""
    adjusted = holm(p_values)
    for raw, one in zip(p_values, adjusted, strict=True):
        assert raw <= one <= min(1.0, len(p_values) * raw) or one == 1.0
    assert [adjusted[i] for i in np.argsort(p_values)] == sorted(adjusted)
