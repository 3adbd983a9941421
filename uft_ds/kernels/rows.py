"""The running sums of a sweep over rows of logits, one tile of columns after another, and the values they give.

R rows (the tokens of each stream, stream after stream), W columns of the tile (entries of the vocabulary).
`rows_torch` and `rows_triton` implement the sweeps and update these sums.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowSums:
    """Sums of each row over the columns swept so far: [rows] each, float32, updated in place.

    The target is kept apart from the other tokens. 1 - p(target) is then a sum of small numbers, accurate even at
    1e-10, and not a difference of large ones.
    """

    highest_R: Tensor
    """The largest logit, the target's included."""
    others_R: Tensor
    """Sum of exp(logit - highest) over all tokens except the target."""
    target_R: Tensor
    """The target's logit; NaN until its column has been swept. A target outside the vocabulary thus gives NaN."""
    rescale_R: Tensor
    """exp(highest before the last tile - highest now): the factor by which earlier partial sums must be multiplied, as
    in an online softmax."""
    weighted_R: Tensor | None
    """Sum of exp(logit - highest) * (logit - highest) over all tokens except the target; for the entropy."""


class RowValues(NamedTuple):
    """The values that follow from the sums over all columns: [rows] each; float32, but `is_top1_R` is bool."""

    logps_R: Tensor
    """log p(target), nats."""
    is_top1_R: Tensor
    """Whether no token has a larger logit than the target."""
    entropy_R: Tensor | None
    """- sum p log p, nats; None if it was not requested."""
    highest_R: Tensor
    others_R: Tensor
    """As in `RowSums`; others / total is 1 - p(target)."""
    total_R: Tensor
    """Sum of exp(logit - highest) over all tokens."""

    def at(self, rows: slice) -> RowValues:
        """The values of some rows."""
        return RowValues._make(None if values_R is None else values_R[rows] for values_R in self)


class UpstreamRows(NamedTuple):
    """The values of each row that the backward needs besides the logits: [rows] each, float32."""

    highest_R: Tensor
    others_R: Tensor
    """As in `RowSums`."""
    scales_R: Tensor
    """Upstream gradient / sum of exp(logit - highest) over all tokens."""

    def at(self, rows: slice) -> UpstreamRows:
        """The values of some rows."""
        return UpstreamRows(self.highest_R[rows], self.others_R[rows], self.scales_R[rows])


def no_columns_yet(num_rows: int, dtype: torch.dtype, device: torch.device, *, with_entropy: bool = False) -> RowSums:
    """The sums before the first tile."""
    # The largest logit starts at the lowest finite number, because -inf - -inf would be NaN.
    zeros_R = torch.zeros(num_rows, dtype=dtype, device=device)
    return RowSums(
        highest_R=torch.full_like(zeros_R, torch.finfo(dtype).min),
        others_R=zeros_R,
        target_R=torch.full_like(zeros_R, torch.nan),
        rescale_R=torch.ones_like(zeros_R),
        weighted_R=torch.zeros_like(zeros_R) if with_entropy else None,
    )


def values_of(sums: RowSums) -> RowValues:
    """The values of each row, from its sums over all columns."""
    below_highest_R = sums.target_R - sums.highest_R
    target_exp_R = below_highest_R.exp()
    total_R = sums.others_R + target_exp_R
    # For a confident token, -log1p(others / target) is accurate for 1 - p down to 1e-38; log(total) loses all digits
    # below 1e-7.
    logps_R = torch.where(
        target_exp_R > 0.5, -torch.log1p(sums.others_R / target_exp_R), below_highest_R - total_R.log()
    )
    entropy_R = None
    if sums.weighted_R is not None:
        target_part_R = torch.where(target_exp_R > 0, target_exp_R * below_highest_R, 0.0)  # 0 * -inf is NaN
        entropy_R = total_R.log() - (sums.weighted_R + target_part_R) / total_R
    return RowValues(logps_R, below_highest_R == 0, entropy_R, sums.highest_R, sums.others_R, total_R)


def joined(parts: list[RowValues]) -> RowValues:
    """Concatenate the rows of all parts, in their order; there must be at least one part."""
    return RowValues._make(None if field[0] is None else torch.cat(field) for field in zip(*parts, strict=True))
