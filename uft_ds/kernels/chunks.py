"""The loops over chunks of tokens and tiles of the vocabulary that frozen and trainable heads share.

N tokens of the call, C of a chunk, R rows of a matmul (the chunk's policy rows, padded, then its reference rows),
D hidden size, V vocabulary, W entries of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from uft_ds.kernels.logits import LogitTransform, accumulation_dtype, mm_float32, must_be_cast
from uft_ds.kernels.rows import RowValues, no_columns_yet, sweeps_for, values_of
from uft_ds.kernels.tiles import Tile, tile_of


@dataclass(frozen=True)
class VocabularyTile:
    """Some consecutive rows of the head's weight."""

    first_token: int
    weight_WD: Tensor
    """As matmuls take it: cast to float32 where the device has no other way to accumulate in it."""
    bias_W: Tensor | None

    @property
    def tokens(self) -> slice:
        return slice(self.first_token, self.first_token + len(self.weight_WD))


@dataclass(frozen=True)
class Head:
    weight_VD: Tensor
    bias_V: Tensor | None
    transform: LogitTransform

    def tile(
        self,
        num_tokens: int,
        streams: int,
        chunk_bytes: int | None,
        *,
        with_entropy: bool = False,
        trains_weight: bool = False,
    ) -> Tile:
        """`tile_of` by what the sweeps hold: the logits, slopes under a cap, a copy for the entropy; a weight's cast
        copy, its gradient and what is added to that."""
        vocabulary, dim = self.weight_VD.shape
        return tile_of(
            num_tokens,
            streams,
            vocabulary,
            self.weight_VD.device,
            chunk_bytes=chunk_bytes,
            bytes_per_logit=4 * (1 + (self.transform.softcap is not None) + 2 * with_entropy),
            bytes_per_column=4 * dim * (must_be_cast(self.weight_VD) + 2 * trains_weight),
        )

    def vocabulary_tiles(self, width: int) -> Iterator[VocabularyTile]:
        cast = must_be_cast(self.weight_VD)
        bias_V = None if self.bias_V is None else self.bias_V.contiguous()
        for first in range(0, self.weight_VD.shape[0], width):
            weight_WD = self.weight_VD[first : first + width]
            bias_W = None if bias_V is None else bias_V[first : first + width]
            yield VocabularyTile(first, weight_WD.float() if cast else weight_WD, bias_W)


@dataclass(frozen=True)
class Chunk:
    """Rows that go through each matmul together."""

    tokens: slice
    """Of the call's N."""
    num_tokens: int
    hidden_RD: Tensor
    targets_R: Tensor

    @property
    def policy_rows(self) -> slice:
        return slice(0, self.num_tokens)

    @property
    def reference_rows(self) -> slice:
        first = len(self.targets_R) // 2
        return slice(first, first + self.num_tokens)


def chunks_of(hidden_ND: Tensor, targets_N: Tensor, reference_hidden_ND: Tensor | None, rows: int) -> Iterator[Chunk]:
    """Chunks of `rows` tokens, a shorter last one padded with zeros; what the sweeps read is contiguous."""
    targets_N = targets_N.contiguous()
    streams = [hidden_ND] if reference_hidden_ND is None else [hidden_ND, reference_hidden_ND]
    for first in range(0, len(targets_N), rows):
        tokens = slice(first, min(first + rows, len(targets_N)))
        targets_C = targets_N[tokens]
        num_tokens = len(targets_C)
        if len(streams) == 1 and num_tokens == rows:
            hidden_RD, targets_R = hidden_ND[tokens], targets_C
        else:
            hidden_RD = hidden_ND.new_zeros(len(streams) * rows, hidden_ND.shape[1])
            targets_R = targets_N.new_zeros(len(streams) * rows)
            for index, stream_ND in enumerate(streams):
                block = slice(index * rows, index * rows + num_tokens)
                hidden_RD[block], targets_R[block] = stream_ND[tokens], targets_C
        yield Chunk(tokens, num_tokens, hidden_RD, targets_R)


def sweep_vocabulary(
    chunk: Chunk, head: Head, width: int, *, with_gradients: bool, with_entropy: bool
) -> tuple[RowValues, Tensor | None]:
    """The values of all rows over the whole vocabulary, and d logp / d hidden of the policy's, [C, D].

        d logp / d hidden = (others * weight[target] - sum_{v != target} e_v weight[v]) / total
        e_v = exp(z_v - highest)

    where `others` is the sum of the same e_v. Both sums grow tile by tile and shrink whenever a larger logit turns up
    (as in arXiv 2205.14135, section 3.1). With a capped or scaled logit z each weight is times its slope.
    """
    dtype = accumulation_dtype(chunk.hidden_RD.dtype)
    device = chunk.hidden_RD.device
    sweeps = sweeps_for(device, dtype)
    sums = no_columns_yet(len(chunk.targets_R), dtype, device, with_entropy=with_entropy)
    policy = chunk.policy_rows
    others_CD: Tensor | None = None
    for tile in head.vocabulary_tiles(width):
        exps_CW = sweeps.absorb_tile(
            mm_float32(chunk.hidden_RD, tile.weight_WD.T),
            chunk.targets_R,
            tile.first_token,
            sums,
            head.transform,
            bias_W=tile.bias_W,
            kept_rows=chunk.num_tokens if with_gradients else 0,
            dtype=tile.weight_WD.dtype,
        )
        if not with_gradients:
            continue
        if others_CD is None:
            others_CD = mm_float32(exps_CW, tile.weight_WD)
        else:
            others_CD.mul_(sums.rescale_R[policy, None])
            if exps_CW.dtype == others_CD.dtype:
                torch.addmm(others_CD, exps_CW, tile.weight_WD, out=others_CD)
            else:
                others_CD.add_(mm_float32(exps_CW, tile.weight_WD))
    values = values_of(sums)
    if others_CD is None:
        return values, None
    # A target outside the vocabulary has made its row NaN; looking its weight up would end a GPU's context.
    inside_C = chunk.targets_R[policy].clamp(0, len(head.weight_VD) - 1)
    target_weight_CD = head.weight_VD.index_select(0, inside_C).to(dtype)
    rest_C = sums.others_R[policy] * head.transform.slope(sums.target_R[policy])
    return values, target_weight_CD.mul_(rest_C[:, None]).sub_(others_CD).div_(values.total_R[policy, None])
