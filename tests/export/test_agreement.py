"""How much of what was trained a merged model keeps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from uft_ds.data.example import Response, Sequence
from uft_ds.data.micro_batch import micro_batch
from uft_ds.data.store.account import Account
from uft_ds.data.store.store_files import Place
from uft_ds.data.store.writing import StoreWriter, pack_units
from uft_ds.export.agreement import MAX_RELATIVE_ERROR, ROUNDING_NATS, agreement, sequences_of_run

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
    assert (found.share_kept, found.relative_error) == pytest.approx((share, error))
    assert found.error_nats == pytest.approx(error * 5 / 2**0.5), "|adapter| is 5, of 2 responses"
    assert found.is_faithful == (error <= MAX_RELATIVE_ERROR)


def test_noise_cannot_hide_behind_a_perfect_share() -> None:
    """Noise at a right angle keeps the share at 1, and is far past the bound on the error."""
    found = agreement(torch.tensor(ADAPTER), torch.tensor([7.0, -1.0]))
    assert found.share_kept == pytest.approx(1.0)
    assert not found.is_faithful


def test_nothing_trained_and_nothing_merged_agree() -> None:
    """An untrained adapter: all log-ratios 0 on both sides is a perfect merge."""
    found = agreement(torch.zeros(3), torch.zeros(3))
    assert (found.share_kept, found.relative_error, found.is_faithful) == (1.0, 0.0, True)


def test_nothing_trained_but_something_merged_does_not_agree() -> None:
    """Any log-ratio where there should be none is an infinite relative error; past rounding it is refused."""
    found = agreement(torch.zeros(3), torch.tensor([0.0, 1e-3, 0.0]))
    assert found.share_kept == 0.0
    assert found.relative_error == float("inf")
    assert not found.is_faithful
    assert agreement(torch.zeros(3), torch.tensor([0.0, 1e-6, 0.0])).is_faithful


def test_rounding_is_no_error_however_little_was_trained() -> None:
    """After one tiny step log-ratios are as small as float32's rounding of log-probs: a merge is not refused for it.

    The error is said as it is: 0.9e-4 everywhere against 1e-4 everywhere is 90%, and 1.1e-4, past the bound, 110%.
    """
    adapter_R = torch.full((4,), 1e-4)
    below, above = (agreement(adapter_R, adapter_R + factor * ROUNDING_NATS) for factor in (0.9, 1.1))
    assert (below.relative_error, above.relative_error) == pytest.approx((0.9, 1.1), rel=1e-4)
    assert below.is_faithful
    assert "relative error 90.00% (of 9.0e-05 nats: the training changed too little to distinguish" in below.summary
    assert not above.is_faithful
    assert "too little" not in above.summary


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_never_within_the_bound(bad: float) -> None:
    """A broken merged model fails the comparison that `convert` makes, `error <= bound`."""
    assert not agreement(torch.tensor(ADAPTER), torch.tensor([3.0, bad])).is_faithful


def test_agreement_does_not_depend_on_the_unit() -> None:
    """Log-ratios a thousand times as small give the same numbers."""
    merged = torch.tensor([2.5, -4.5])
    small, large = agreement(torch.tensor(ADAPTER) / 1000, merged / 1000), agreement(torch.tensor(ADAPTER), merged)
    assert small.share_kept == pytest.approx(large.share_kept, rel=1e-5)
    assert small.relative_error == pytest.approx(large.relative_error, rel=1e-5)
    assert small.error_nats == pytest.approx(large.error_nats / 1000, rel=1e-5)


@pytest.mark.parametrize("num_pairs", [1, 3])
def test_the_pairs_of_a_sample_are_several(tmp_path: Path, num_pairs: int) -> None:
    """All pairs are forwarded in one micro-batch, in which each has a number of its own."""
    units = [
        (tuple(Sequence(np.arange(4, dtype=np.int32), (Response(2, 4, s, "pair", "", 0),)) for s in (1.0, 0.0)), row)
        for row in (Place(0, number, 0) for number in range(num_pairs))
    ]
    writer = StoreWriter(tmp_path)
    writer.add(pack_units(units))
    writer.finish(("rows.jsonl",), Account(num_pairs, {}, {}, {}, 0, 0))
    batch = micro_batch(sequences_of_run(tmp_path))
    assert batch.pairs == tuple((2 * number, 2 * number + 1) for number in range(num_pairs))
