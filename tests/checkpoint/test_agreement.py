"""How much of what was trained a merged model keeps."""

from __future__ import annotations

import pytest
import torch

from uft_ds.checkpoint.agreement import MAX_RELATIVE_ERROR, ROUNDING_NATS, agreement

ADAPTER = [3.0, -4.0]
"""Sum of squares 25."""


@pytest.mark.parametrize(
    ("merged", "share", "error"),
    [
        ([3.0, -4.0], 1.0, 0.0),  # the same
        ([1.5, -2.0], 0.5, 0.5),  # half of every change lost
        ([0.0, 0.0], 0.0, 1.0),  # all lost: the base itself
        ([-3.0, 4.0], -1.0, 2.0),  # the wrong sign
        ([6.0, -8.0], 2.0, 1.0),  # twice as much
        ([7.0, -1.0], 1.0, 1.0),  # (4, 3) of noise at a right angle: share 25 / 25, error 5 / 5
        ([3.0, -3.0], 21 / 25, 1 / 5),
    ],
    ids=str,
)
def test_share_and_error_by_hand(merged: list[float], share: float, error: float) -> None:
    """Share: <adapter, merged> / <adapter, adapter>; error: |merged - adapter| / |adapter|."""
    found = agreement(torch.tensor(ADAPTER), torch.tensor(merged))
    assert found == pytest.approx((share, error))
    assert all(type(value) is float for value in found)


def test_noise_cannot_hide_behind_a_perfect_share() -> None:
    """Noise at a right angle keeps the share at 1, and is far past the bound on the error."""
    share, error = agreement(torch.tensor(ADAPTER), torch.tensor([7.0, -1.0]))
    assert share == pytest.approx(1.0)
    assert error > MAX_RELATIVE_ERROR


def test_nothing_trained_and_nothing_merged_agree() -> None:
    """An untrained adapter: all log-ratios 0 on both sides is a perfect merge."""
    assert agreement(torch.zeros(3), torch.zeros(3)) == (1.0, 0.0)


def test_nothing_trained_but_something_merged_does_not_agree() -> None:
    """Any log-ratio where there should be none is an infinite relative error, which no bound lets through."""
    share, error = agreement(torch.zeros(3), torch.tensor([0.0, 1e-6, 0.0]))
    assert share == 0.0
    assert not error <= MAX_RELATIVE_ERROR


def test_rounding_is_no_error_however_little_was_trained() -> None:
    """After one tiny step log-ratios are as small as float32's rounding of log-probs: a merge is not refused for it.

    Just above the bound (1e-4 nats) an error counts in full: 1.1e-4 everywhere against 1e-4 everywhere is 110%.
    """
    adapter_R = torch.full((4,), 1e-4)
    assert agreement(adapter_R, adapter_R + 0.9 * ROUNDING_NATS)[1] == 0.0
    assert agreement(adapter_R, adapter_R + 1.1 * ROUNDING_NATS)[1] == pytest.approx(1.1, rel=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_never_within_the_bound(bad: float) -> None:
    """A broken merged model fails the comparison that `convert` makes, `error <= bound`."""
    _, error = agreement(torch.tensor(ADAPTER), torch.tensor([3.0, bad]))
    assert not error <= MAX_RELATIVE_ERROR


def test_agreement_does_not_depend_on_the_unit() -> None:
    """Log-ratios a thousand times as small give the same numbers."""
    merged = torch.tensor([2.5, -4.5])
    assert agreement(torch.tensor(ADAPTER) / 1000, merged / 1000) == pytest.approx(
        agreement(torch.tensor(ADAPTER), merged), rel=1e-5
    )
