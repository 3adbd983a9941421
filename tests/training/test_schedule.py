"""The learning rate, step by step."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uft_ds.training.schedule import learning_rate

SCHEDULES = ("cosine", "linear", "constant")


def rates(schedule: str, num_steps: int, warmup: float, peak: float = 1.0) -> list[float]:
    return [
        learning_rate(step, num_steps=num_steps, peak=peak, warmup=warmup, schedule=schedule)  # type: ignore[arg-type]
        for step in range(num_steps)
    ]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]),
        ("linear", [0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0.25, 0.5, 0.75, 1, 1, 0.5 + 0.125**0.5, 0.5, 0.5 - 0.125**0.5]),
    ],
)
def test_eight_steps_by_hand(schedule: str, expected: list[float]) -> None:
    """Half of 8 steps rise by quarters to the peak; then progress 0, 1/4, 1/2, 3/4: cos(pi / 4) / 2 = 0.125^0.5."""
    assert rates(schedule, 8, 0.5, peak=3e-5) == pytest.approx([3e-5 * rate for rate in expected])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_without_warmup_the_first_step_is_the_peak(schedule: str) -> None:
    """Also where the warm-up is shorter than half a step (0.01 of 20)."""
    assert rates(schedule, 20, 0.0)[0] == 1.0
    assert rates(schedule, 20, 0.01)[0] == 1.0


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_all_steps_may_be_warmup(schedule: str) -> None:
    """A warm-up of the whole run ends at the peak and divides by nothing."""
    assert rates(schedule, 4, 1.0) == [0.25, 0.5, 0.75, 1.0]
    assert rates(schedule, 1, 1.0) == rates(schedule, 1, 0.0) == [1.0]


@pytest.mark.parametrize(("schedule", "expected"), [("cosine", 0.0), ("linear", 0.0), ("constant", 1.0)])
def test_the_end_is_one_step_past_the_last(schedule: str, expected: float) -> None:
    """No step runs at rate 0; the one after the last would."""
    past = learning_rate(10, num_steps=10, peak=1.0, warmup=0.1, schedule=schedule)  # type: ignore[arg-type]
    assert past == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
@given(num_steps=st.integers(1, 300), warmup=st.floats(0, 1), peak=st.floats(1e-7, 1.0))
def test_rates_rise_then_fall(schedule: str, num_steps: int, warmup: float, peak: float) -> None:
    """For any run: every rate is positive and at most the peak, rising through the warm-up, never rising after."""
    values = rates(schedule, num_steps, warmup, peak)
    split = round(warmup * num_steps)
    assert all(0 < value <= peak * (1 + 1e-12) for value in values)
    assert values[:split] == sorted(values[:split])
    assert values[split:] == sorted(values[split:], reverse=True)
    assert max(values) == pytest.approx(peak)
    assert all(math.isfinite(value) for value in values)
