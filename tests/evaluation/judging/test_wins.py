"""A win rate's interval."""

from __future__ import annotations

import pytest

from uft_ds.evaluation.judging.wins import wilson


@pytest.mark.parametrize(
    ("wins", "count", "low", "high"),
    [
        (0, 1, 0.0, 0.793450686),
        (0, 30, 0.0, 0.113513393),
        (5, 30, 0.073365424, 0.335643505),
        (402, 805, 0.46492415, 0.533839514),
        (805, 805, 0.995250665, 1.0),
    ],
)
def test_the_interval_is_scipys(wins: int, count: int, low: float, high: float) -> None:
    """Where there are no ties: scipy 1.17's `binomtest(wins, count).proportion_ci(0.95, method="wilson")`."""
    assert wilson(wins, count) == pytest.approx((low, high), abs=1e-8)


def test_an_interval_with_ties_holds_that_of_their_variance() -> None:
    """Of 20 ties, 40 wins and 40 losses the mean is 0.5, and its normal interval 0.5 -+ 1.96 sqrt(0.2 / 100)."""
    low, high = wilson(50.0, 100)
    half = 1.96 * (0.8 * 0.25 / 100) ** 0.5
    assert low < 0.5 - half
    assert 0.5 + half < high
