"""Sweeps over rows of logits in plain torch: the implementation for CPUs, and the reference for `rows_triton`.

R rows, W columns of a tile, K rows with gradient, which come first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from uft_ds.kernels.logits import LogitTransform
from uft_ds.kernels.rows import RowSums, UpstreamRows


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
    """Add a tile's columns to the sums, and return the exponentials for the gradient in the tile's memory.

    Args:
        products_RW: hidden @ weight^T of tokens first_token .. first_token + W - 1; overwritten.
        kept_rows: the number of rows with gradient; they come first.
        dtype: of the result.
    Returns:
        [kept rows, W]: exp(logit - highest) * d logit / d product, 0 for the target.
    """
    logits_RW = transform.apply_(products_RW, bias_W)
    rows_R = torch.arange(len(targets_R), device=targets_R.device)
    inside_R, columns_R = _columns_of(targets_R, first_token, logits_RW.shape[1])
    sums.target_R.copy_(torch.where(inside_R, logits_RW[rows_R, columns_R], sums.target_R))
    slopes_KW = transform.slope(logits_RW[:kept_rows])  # before the logits are overwritten by their exponentials

    highest_R = torch.maximum(sums.highest_R, logits_RW.amax(dim=1))
    shift_R = sums.highest_R - highest_R
    sums.rescale_R.copy_(shift_R.exp())
    sums.highest_R.copy_(highest_R)
    exps_RW = logits_RW.sub_(highest_R[:, None])
    here_R = None if sums.weighted_R is None else torch.empty_like(highest_R)
    # The entropy needs a copy of the centred logits. In blocks of rows the copy is an eighth of a tile and stays in the
    # cache.
    block_rows = max(16, len(targets_R) // 8) if here_R is not None else len(targets_R)
    for first in range(0, len(targets_R), block_rows):
        block = slice(first, first + block_rows)
        centred_BW = None if here_R is None else exps_RW[block].clone()
        exps_BW = exps_RW[block].exp_()
        places_B = rows_R[: len(exps_BW)], columns_R[block]
        exps_BW[places_B] = torch.where(inside_R[block], 0.0, exps_BW[places_B])
        if here_R is not None and centred_BW is not None:
            here_R[block] = centred_BW.mul_(exps_BW).masked_fill_(exps_BW == 0, 0.0).sum(dim=1)  # 0 * -inf is NaN
    # `weighted_R` uses the old value of `others_R`, so it is updated first.
    if sums.weighted_R is not None and here_R is not None:
        sums.weighted_R.add_(shift_R * sums.others_R).mul_(sums.rescale_R).add_(here_R)
    sums.others_R.mul_(sums.rescale_R).add_(exps_RW.sum(dim=1))

    kept_KW = exps_RW[:kept_rows]
    if not isinstance(slopes_KW, float) or slopes_KW != 1:
        kept_KW.mul_(slopes_KW)
    return kept_KW.to(dtype)


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
    """upstream * d log p(target) / d product, computed in the tile's memory from the sums over all columns.

    Args:
        products_RW: as for `absorb_tile`; overwritten.
        dtype: of the result.
    Returns:
        [rows, W].
    """
    logits_RW = transform.apply_(products_RW, bias_W)
    rows_R = torch.arange(len(targets_R), device=targets_R.device)
    inside_R, columns_R = _columns_of(targets_R, first_token, logits_RW.shape[1])
    slopes_RW = transform.slope(logits_RW)
    residuals_RW = logits_RW.sub_(rows.highest_R[:, None]).exp_().neg_()
    residuals_RW[rows_R, columns_R] = torch.where(inside_R, rows.others_R, residuals_RW[rows_R, columns_R])
    return residuals_RW.mul_(rows.scales_R[:, None]).mul_(slopes_RW).to(dtype)


def _columns_of(targets_R: Tensor, first_token: int, width: int) -> tuple[Tensor, Tensor]:
    """Whether each row's target is in the tile, and its column, clamped to the tile."""
    columns_R = targets_R - first_token
    return (columns_R >= 0) & (columns_R < width), columns_R.clamp(0, width - 1)
