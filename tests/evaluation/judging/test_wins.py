"""A win rate's interval."""

from __future__ import annotations

import pytest
from scipy.stats import binomtest

from uft_ds.evaluation.judging.wins import wilson


@pytest.mark.parametrize(("wins", "count"), [(0, 1), (0, 30), (5, 30), (402, 805), (805, 805)])
def test_the_interval_is_scipys(wins: int, count: int) -> None:
    """Where there are no ties; none is a single point, also without any win."""
    expected = binomtest(wins, count).proportion_ci(0.95, method="wilson")
    assert wilson(wins, count) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_an_interval_with_ties_holds_that_of_their_variance() -> None:
    """Of 20 ties, 40 wins and 40 losses the mean is 0.5, and its normal interval 0.5 -+ 1.96 sqrt(0.2 / 100)."""
    low, high = wilson(50.0, 100)
    half = 1.96 * (0.8 * 0.25 / 100) ** 0.5
    assert low < 0.5 - half
    assert 0.5 + half < high
