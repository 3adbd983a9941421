"""What one sweep over rows of logits leaves behind, tile of columns by tile of columns.

R rows (the tokens of each stream, stream after stream), W columns of the tile (entries of the vocabulary).
Two implementations of the sweeps, `rows_torch` and `rows_triton`, keep these sums.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowSums:
    """Of each row, over the columns swept so far; the tensors are updated in place. [rows], float32.

    The target is kept apart from the others: 1 - p(target) is then a sum of small numbers, exact where it is 1e-10,
    instead of a difference of large ones.
    """

    highest_R: Tensor
    """The largest logit, the target's included."""
    others_R: Tensor
    """sum over the tokens but the target of exp(logit - highest)."""
    target_R: Tensor
    """The target's logit; NaN until its column has been swept, so that a target outside the vocabulary is seen."""
    rescale_R: Tensor
    """exp(highest before the last tile - highest now): the factor by which earlier partial sums must be multiplied, as
    in an online softmax."""
    weighted_R: Tensor | None
    """sum over the tokens but the target of exp(logit - highest) * (logit - highest); for the entropy."""


class RowValues(NamedTuple):
    """What follows from the sums over all columns: [rows] each, float32 but for `is_top1_R`."""

    logps_R: Tensor
    """log p(target), nats."""
    is_top1_R: Tensor
    """No token has a larger logit than the target."""
    entropy_R: Tensor | None
    """- sum p log p, nats."""
    highest_R: Tensor
    others_R: Tensor
    """As in `RowSums`; others / total is 1 - p(target)."""
    total_R: Tensor
    """sum over all tokens of exp(logit - highest)."""

    def at(self, rows: slice) -> RowValues:
        return RowValues._make(None if values_R is None else values_R[rows] for values_R in self)


class UpstreamRows(NamedTuple):
    """What a backward must know of each row, once the sums over all columns are known: [rows], float32 each."""

    highest_R: Tensor
    others_R: Tensor
    """As in `RowSums`."""
    scales_R: Tensor
    """Gradient from above / sum over all tokens of exp(logit - highest)."""

    def at(self, rows: slice) -> UpstreamRows:
        return UpstreamRows(self.highest_R[rows], self.others_R[rows], self.scales_R[rows])


def no_columns_yet(num_rows: int, dtype: torch.dtype, device: torch.device, *, with_entropy: bool = False) -> RowSums:
    """The sums over nothing. The largest logit starts at the lowest finite number: -inf - -inf would be NaN."""
    zeros_R = torch.zeros(num_rows, dtype=dtype, device=device)
    return RowSums(
        highest_R=torch.full_like(zeros_R, torch.finfo(dtype).min),
        others_R=zeros_R,
        target_R=torch.full_like(zeros_R, torch.nan),
        rescale_R=torch.ones_like(zeros_R),
        weighted_R=torch.zeros_like(zeros_R) if with_entropy else None,
    )


def values_of(sums: RowSums) -> RowValues:
    below_highest_R = sums.target_R - sums.highest_R
    target_exp_R = below_highest_R.exp()
    total_R = sums.others_R + target_exp_R
    # A confident token: log p = -log1p(others / target) keeps its digits down to 1e-38, log(total) none below 1e-7.
    logps_R = torch.where(
        target_exp_R > 0.5, -torch.log1p(sums.others_R / target_exp_R), below_highest_R - total_R.log()
    )
    entropy_R = None
    if sums.weighted_R is not None:
        target_part_R = torch.where(target_exp_R > 0, target_exp_R * below_highest_R, 0.0)  # 0 * -inf is NaN
        entropy_R = total_R.log() - (sums.weighted_R + target_part_R) / total_R
    return RowValues(logps_R, below_highest_R == 0, entropy_R, sums.highest_R, sums.others_R, total_R)


def joined(parts: list[RowValues]) -> RowValues:
    """The rows of all parts, in their order; at least one part."""
    return RowValues._make(None if field[0] is None else torch.cat(field) for field in zip(*parts, strict=True))
