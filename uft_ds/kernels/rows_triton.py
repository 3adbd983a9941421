"""Sweeps over rows of logits in Triton: two reads and one write of a tile (one read for rows without gradient).

Plain torch makes about six passes. The functions and results are those of `rows_torch`. One program sweeps one row, so
results do not depend on how rows are grouped. No two programs touch the same memory, so there are no atomics and the
bits are the same every time. Matrix products stay with cuBLAS.

The result is written into the tile's own memory, in a narrower dtype from the start of the same row. When columns
j .. j + BLOCK are written (2 bytes each), the float32 columns that they cover, j/2 .. j/2 + BLOCK/2, have already been
read by the same block of threads, in this iteration or an earlier one. The barrier between load and store makes sure
that this holds for all its warps.
"""

from __future__ import annotations

# mypy: allow-untyped-defs
import torch
import triton
import triton.language as tl
from torch import Tensor

from uft_ds.kernels.logits import LogitTransform
from uft_ds.kernels.rows import RowSums, UpstreamRows

MOST_COLUMNS = 4096
"""Columns per iteration, 16 values for each thread. The kernel is memory-bound; larger blocks only cost registers."""


@triton.jit
def _tanh(x):
    """tanh in float32. Near 0 the quotient loses digits, so a series is used there, with relative error 1e-8."""
    square = x * x
    series = x * (1.0 + square * (-1.0 / 3 + square * (2.0 / 15 + square * (-17.0 / 315 + square * (62.0 / 2835)))))
    quotient = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
    return tl.where(tl.abs(x) < 0.25, series, tl.where(x < 0, -quotient, quotient))


@triton.jit
def _load_logits(
    products_ptr, bias_ptr, columns, width, factor, inner, bound, HAS_BIAS: tl.constexpr, CAPPED: tl.constexpr
):
    """Logits of some columns of a row, as `LogitTransform.apply_` computes them; -inf beyond the width."""
    mask = columns < width
    products = tl.load(products_ptr + columns, mask=mask, other=0.0)
    if HAS_BIAS:
        products += tl.load(bias_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    logits = _tanh(products * inner) * bound if CAPPED else products * factor
    return tl.where(mask, logits, float("-inf"))


@triton.jit
def _slope(logits, factor, bound, CAPPED: tl.constexpr):
    """`LogitTransform.slope`; 0 beyond the width, where the logit is -inf."""
    if CAPPED:
        share = logits / bound
        return tl.where(tl.abs(share) <= 1.0, (1.0 - share) * (1.0 + share) * factor, 0.0)
    else:
        return factor


@triton.jit
def absorb_kernel(
    products_ptr,
    bias_ptr,
    out_ptr,
    targets_ptr,
    highest_ptr,
    others_ptr,
    target_ptr,
    weighted_ptr,
    rescale_ptr,
    first_token,
    width,
    kept_rows,
    products_stride,
    out_stride,
    factor,
    inner,
    bound,
    HAS_BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # a row's offset exceeds 2^31 at 14k rows of 152k logits
    products_ptr += row * products_stride
    out_ptr += row * out_stride
    target_column = tl.load(targets_ptr + row) - first_token
    before = tl.load(highest_ptr + row)
    highest = before
    others = tl.load(others_ptr + row)
    weighted = 0.0
    if WITH_ENTROPY:
        weighted = tl.load(weighted_ptr + row)

    is_inside = (target_column >= 0) & (target_column < width)
    safe_column = tl.where(is_inside, target_column, 0) + tl.zeros((1,), tl.int64)
    target = tl.sum(
        _load_logits(products_ptr, bias_ptr, safe_column, width, factor, inner, bound, HAS_BIAS, CAPPED), axis=0
    )
    tl.store(target_ptr + row, target, mask=is_inside)

    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        logits = _load_logits(products_ptr, bias_ptr, columns, width, factor, inner, bound, HAS_BIAS, CAPPED)
        higher = tl.maximum(highest, tl.max(logits, axis=0))
        shrink = tl.exp(highest - higher)
        centred = logits - higher
        exps = tl.where(columns == target_column, 0.0, tl.exp(centred))
        if WITH_ENTROPY:
            here = tl.sum(exps * tl.where(exps > 0, centred, 0.0), axis=0)  # 0 * -inf is NaN
            weighted = (weighted + (highest - higher) * others) * shrink + here
        others = others * shrink + tl.sum(exps, axis=0)
        highest = higher
    tl.store(highest_ptr + row, highest)
    tl.store(others_ptr + row, others)
    tl.store(rescale_ptr + row, tl.exp(before - highest))
    if WITH_ENTROPY:
        tl.store(weighted_ptr + row, weighted)

    if row < kept_rows:
        for start in range(0, width, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            logits = _load_logits(products_ptr, bias_ptr, columns, width, factor, inner, bound, HAS_BIAS, CAPPED)
            exps = tl.where(columns == target_column, 0.0, tl.exp(logits - highest))
            exps *= _slope(logits, factor, bound, CAPPED)
            tl.debug_barrier()  # all warps have loaded before any of them overwrites; see the module's docstring
            tl.store(out_ptr + columns, exps.to(out_ptr.dtype.element_ty), mask=columns < width)


@triton.jit
def residuals_kernel(
    products_ptr,
    bias_ptr,
    out_ptr,
    targets_ptr,
    highest_ptr,
    others_ptr,
    scales_ptr,
    first_token,
    width,
    products_stride,
    out_stride,
    factor,
    inner,
    bound,
    HAS_BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    products_ptr += row * products_stride
    out_ptr += row * out_stride
    target_column = tl.load(targets_ptr + row) - first_token
    highest = tl.load(highest_ptr + row)
    others = tl.load(others_ptr + row)
    scale = tl.load(scales_ptr + row)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        logits = _load_logits(products_ptr, bias_ptr, columns, width, factor, inner, bound, HAS_BIAS, CAPPED)
        residuals = tl.where(columns == target_column, others, -tl.exp(logits - highest)) * scale
        residuals *= _slope(logits, factor, bound, CAPPED)
        tl.debug_barrier()  # all warps have loaded before any of them overwrites; see the module's docstring
        tl.store(out_ptr + columns, residuals.to(out_ptr.dtype.element_ty), mask=columns < width)


def absorb_tile(
    products_RW: Tensor,
    targets_R: Tensor,
    first_token: int,
    sums: RowSums,
    transform: LogitTransform,
    *,
    bias_W: Tensor | None,
    kept_rows: int,
    dtype: torch.dtype,
) -> Tensor:
    """See `rows_torch.absorb_tile`."""
    exps_RW = _narrowed(products_RW, dtype)
    with torch.cuda.device_of(products_RW):  # Triton launches on the current device, which may be another one
        absorb_kernel[(len(targets_R),)](
            products_RW,
            products_RW if bias_W is None else bias_W,
            exps_RW,
            targets_R,
            sums.highest_R,
            sums.others_R,
            sums.target_R,
            sums.highest_R if sums.weighted_R is None else sums.weighted_R,
            sums.rescale_R,
            first_token,
            products_RW.shape[1],
            kept_rows,
            products_RW.stride(0),
            exps_RW.stride(0),
            *_factors(transform),
            HAS_BIAS=bias_W is not None,
            CAPPED=transform.softcap is not None,
            WITH_ENTROPY=sums.weighted_R is not None,
            **launch_options(products_RW.shape[1]),
        )
    return exps_RW[:kept_rows]


def residuals(
    products_RW: Tensor,
    targets_R: Tensor,
    first_token: int,
    rows: UpstreamRows,
    transform: LogitTransform,
    *,
    bias_W: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """See `rows_torch.residuals`."""
    residuals_RW = _narrowed(products_RW, dtype)
    with torch.cuda.device_of(products_RW):
        residuals_kernel[(len(targets_R),)](
            products_RW,
            products_RW if bias_W is None else bias_W,
            residuals_RW,
            targets_R,
            *rows,
            first_token,
            products_RW.shape[1],
            products_RW.stride(0),
            residuals_RW.stride(0),
            *_factors(transform),
            HAS_BIAS=bias_W is not None,
            CAPPED=transform.softcap is not None,
            **launch_options(products_RW.shape[1]),
        )
    return residuals_RW


def launch_options(width: int) -> dict[str, int]:
    """Launch options, fixed by the shape: for a memory-bound sweep the block only has to fit the row."""
    block = min(MOST_COLUMNS, max(128, triton.next_power_of_2(width)))
    return {"BLOCK": block, "num_warps": max(1, min(8, block // 512))}


def _factors(transform: LogitTransform) -> tuple[float, float, float]:
    if transform.softcap is None or transform.bound is None:
        return transform.factor, 1.0, 1.0
    return transform.factor, transform.scale / transform.softcap, transform.bound


def _narrowed(products_RW: Tensor, dtype: torch.dtype) -> Tensor:
    """A view of the same shape with another dtype; each row starts where the row of products starts."""
    if products_RW.dtype != torch.float32 or products_RW.stride(1) != 1 or dtype.itemsize > 4:
        raise TypeError(f"logits: {products_RW.dtype}, strides {products_RW.stride()}, expected rows of float32")
    return products_RW.view(dtype)[:, : products_RW.shape[1]]
