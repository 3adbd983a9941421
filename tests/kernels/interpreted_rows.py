"""The Triton sweeps in Triton's interpreter, against plain torch.

Run by `test_rows_triton.py`, in a process of its own: `TRITON_INTERPRET=1` is read when a kernel is defined.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import logps_and_statistics
from suites import long_but
from torch import Tensor

from uft_ds.kernels import chunks, rows_torch, rows_triton
from uft_ds.kernels.chunks import Head
from uft_ds.kernels.logits import UNCHANGED, LogitTransform
from uft_ds.kernels.naive import naive_token_logps
from uft_ds.kernels.rows import RowSums, UpstreamRows, no_columns_yet, values_of
from uft_ds.kernels.sweeps import sweeps_for
from uft_ds.kernels.token_logps import token_logps

CAPPED = LogitTransform(scale=0.5, softcap=5.0, temperature=1.3)
SPLITS = [(37,), (5, 37), (300, 4097), (4096, 4096, 1)]
"""Widths of consecutive tiles: one block and several, aligned and not, a tile of one column."""


def sweep(
    module: Any,
    logits_RV: Tensor,
    targets_R: Tensor,
    widths: tuple[int, ...],
    transform: LogitTransform,
    bias_V: Tensor | None,
    dtype: torch.dtype,
) -> tuple[RowSums, list[Tensor]]:
    """The sums over all tiles, and what both functions leave of each tile."""
    sums = no_columns_yet(len(targets_R), torch.float32, torch.device("cpu"), with_entropy=True)
    scales_R = torch.linspace(-2, 2, len(targets_R))
    left, tiles, first = [], [], 0
    for width in widths:
        bias_W = None if bias_V is None else bias_V[first : first + width].to(dtype)
        tiles.append((first, logits_RV[:, first : first + width], bias_W))
        first += width
    options: dict[str, Any] = {"dtype": dtype}
    for first, tile_RW, bias_W in tiles:
        out = module.absorb_tile(
            tile_RW.clone(), targets_R, first, sums, transform, bias_W=bias_W, kept_rows=2, **options
        )
        left.append(out.clone())
    rows = UpstreamRows(sums.highest_R, sums.others_R / 1e3, scales_R)  # the others as large as the rest of its row
    for first, tile_RW, bias_W in tiles:
        out = module.residuals(tile_RW.clone(), targets_R, first, rows, transform, bias_W=bias_W, **options)
        left.append(out.clone())
    return sums, left


@pytest.mark.parametrize(
    ("widths", "dtype"),
    [(widths, dtype) for widths in SPLITS for dtype in (torch.float32, torch.bfloat16)]
    + [(widths, torch.float16) for widths in SPLITS if sum(widths) < 100],  # only rounding differs from bfloat16
    ids=str,
)
@pytest.mark.parametrize("with_bias", long_but([True], [False, True]), ids=["no bias", "bias"])
@pytest.mark.parametrize("transform", long_but([CAPPED], [UNCHANGED, CAPPED]), ids=["plain", "capped"])
def test_sweeps_do_what_plain_torch_does(
    widths: tuple[int, ...], transform: LogitTransform, with_bias: bool, dtype: torch.dtype
) -> None:
    """Sums to float32 rounding, what is left of a tile to the rounding of the weights' type; rows past the kept ones
    are only summed."""
    generator = torch.Generator().manual_seed(sum(widths))
    logits_RV = torch.randn(4, sum(widths), generator=generator) * 3
    targets_R = torch.randint(sum(widths), (4,), generator=generator)
    bias_V = torch.randn(sum(widths), generator=generator) if with_bias else None
    (sums, left), (torch_sums, torch_left) = (
        sweep(module, logits_RV, targets_R, widths, transform, bias_V, dtype) for module in (rows_triton, rows_torch)
    )
    for name in ("highest_R", "others_R", "target_R", "weighted_R"):
        torch.testing.assert_close(getattr(sums, name), getattr(torch_sums, name), rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(sums.rescale_R, torch_sums.rescale_R, rtol=1e-5, atol=0)
    values, torch_values = values_of(sums), values_of(torch_sums)
    torch.testing.assert_close(values.logps_R, torch_values.logps_R, rtol=0, atol=4e-6)
    torch.testing.assert_close(values.entropy_R, torch_values.entropy_R, rtol=0, atol=4e-6)
    assert torch.equal(values.is_top1_R, torch_values.is_top1_R)
    unit = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[dtype]
    for ours, plain in zip(left, torch_left, strict=True):
        assert ours.dtype == plain.dtype == dtype
        torch.testing.assert_close(ours, plain, rtol=unit, atol=1e-6)


def test_sweeps_are_taken_under_the_interpreter() -> None:
    """The tests below would otherwise compare plain torch with itself."""
    assert sweeps_for(torch.device("cpu"), torch.float32) is rows_triton


@pytest.mark.parametrize(
    ("options", "chunk_bytes"),
    # One tile; two forward and seven backward, the last uneven.
    [({"softcap": 5.0, "scale": 0.5, "temperature": 1.3}, None), ({}, 2**15)],
    ids=["capped, one tile", "plain, many tiles"],
)
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("dtype", long_but([torch.bfloat16], [torch.float32, torch.bfloat16]), ids=str)
def test_log_probs_and_gradients(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    trainable: bool,
    options: dict[str, float],
    chunk_bytes: int | None,
) -> None:
    """All of `token_logps` through the Triton sweeps: log-probs within 1e-5 of float64, gradients to their rounding,
    equal reference rows exactly equal. Weights stay bfloat16 as on a GPU; targets and bias are strided views."""
    monkeypatch.setattr(chunks, "must_be_cast", lambda weight: False)
    generator = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(9, 50, generator=generator).to(dtype).requires_grad_()
    weight_VD = (torch.randn(307, 50, generator=generator) * 3 / 50**0.5).to(dtype).requires_grad_(trainable)
    bias_V = torch.randn(307, 2, generator=generator).to(dtype)[:, 0].requires_grad_(trainable)
    targets_N = torch.randint(307, (9, 2), generator=generator)[:, 0]
    upstream_N = torch.randn(9, generator=generator)
    logps_N, reference_N = token_logps(
        hidden_ND,
        weight_VD,
        targets_N,
        others_ND=[hidden_ND.detach()],
        bias=bias_V,
        transform=LogitTransform(**options),
        chunk_bytes=chunk_bytes,
    )
    assert torch.equal(logps_N, reference_N)
    inputs = [hidden_ND, weight_VD, bias_V] if trainable else [hidden_ND]
    grads = torch.autograd.grad(logps_N, inputs, upstream_N)
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden_ND, weight_VD, bias_V)]
    true_N = naive_token_logps(exact[0], exact[1], targets_N, exact[2], **options)
    torch.testing.assert_close(logps_N.double(), true_N, rtol=0, atol=1e-5)
    true_grads = torch.autograd.grad(true_N, exact[: len(inputs)], upstream_N.double())
    for grad, true_grad in zip(grads, true_grads, strict=True):
        # Half a unit of bfloat16 is 2^-8: what a tile leaves is rounded, a row of gradients, and the row when scaled.
        bound = {torch.float32: 2e-6, torch.bfloat16: 3 * 2.0**-8}[dtype] * float(true_grad.abs().max())
        torch.testing.assert_close(grad.double(), true_grad, rtol=0, atol=bound)


def test_extreme_logits_stay_finite() -> None:
    """Logits of +-1e4 and a bias of -inf: no inf - inf, no 0 * inf."""
    weight_VD = torch.tensor([[8192.0], [0.0], [-8192.0], [1.0]])
    hidden_ND = torch.ones(3, 1).requires_grad_()
    bias_V = torch.tensor([0.0, 0.0, 0.0, float("-inf")])
    targets_N = torch.tensor([0, 1, 2])
    (logps_N,), (statistics,) = logps_and_statistics([hidden_ND], Head(weight_VD, bias_V), targets_N)
    assert logps_N.tolist() == [0.0, -8192.0, -16384.0]
    assert statistics.entropy_N.tolist() == [0.0] * 3
    assert statistics.is_top1_N.tolist() == [True, False, False]
    _, (impossible,) = logps_and_statistics([hidden_ND], Head(weight_VD, bias_V), torch.tensor([3, 3, 3]))
    assert impossible.entropy_N.tolist() == [0.0] * 3
    (grad_ND,) = torch.autograd.grad(logps_N.sum(), hidden_ND)
    assert grad_ND.tolist() == [[0.0], [-8192.0], [-16384.0]]


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_strided_inputs(trainable: bool) -> None:
    """A column of a table of targets: a kernel that takes them for contiguous reads the neighbouring column. Sixteen of
    them, because a chunk that needs no padding is not copied."""
    generator = torch.Generator().manual_seed(0)
    targets_N = torch.randint(97, (16, 2), generator=generator)[:, 0]
    bias_V = torch.randn(97, 2, generator=generator)[:, 0]
    weight_VD = torch.randn(97, 8, generator=generator).requires_grad_(trainable)
    hidden_ND = torch.randn(8, 16, generator=generator).T.requires_grad_()
    (logps_N,) = token_logps(hidden_ND, weight_VD, targets_N, bias=bias_V)
    true_N = naive_token_logps(hidden_ND, weight_VD, targets_N, bias_V)
    torch.testing.assert_close(logps_N, true_N, rtol=0, atol=1e-5)
    (grad_ND,) = torch.autograd.grad(logps_N.sum(), hidden_ND)
    torch.testing.assert_close(grad_ND, torch.autograd.grad(true_N.sum(), hidden_ND)[0], rtol=0, atol=1e-5)
