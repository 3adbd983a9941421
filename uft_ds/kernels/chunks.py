"""The loops over chunks of tokens and tiles of the vocabulary, shared by frozen and trainable heads.

N tokens of the call, C tokens of a chunk, R rows of a matmul (the chunk's tokens once for each stream, in blocks of
equal size), K rows that carry a gradient, D hidden size, V vocabulary, W entries of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from uft_ds.kernels.logits import UNCHANGED, LogitTransform, accumulation_dtype, mm_float32, must_be_cast
from uft_ds.kernels.rows import RowValues, no_columns_yet, values_of
from uft_ds.kernels.sweeps import sweeps_for
from uft_ds.kernels.tiles import Tile, tile_of


@dataclass(frozen=True)
class VocabularyTile:
    """Consecutive rows of the head's weight: a range of the vocabulary."""

    first_token: int
    weight_WD: Tensor
    """The weight in the dtype of the matmul: cast to float32 if `must_be_cast`."""
    bias_W: Tensor | None

    @property
    def tokens(self) -> slice:
        """The tile's range of token ids."""
        return slice(self.first_token, self.first_token + len(self.weight_WD))


@dataclass(frozen=True)
class Head:
    """The weight, bias and transform that turn hidden states into logits, and the memory limit for logits.

    chunk_bytes: memory for the logits that are held at once; None: a default for the device.
    """

    weight_VD: Tensor
    bias_V: Tensor | None = None
    transform: LogitTransform = UNCHANGED
    chunk_bytes: int | None = None

    @property
    def is_trained(self) -> bool:
        """Whether the weight or the bias requires a gradient."""
        return self.weight_VD.requires_grad or (self.bias_V is not None and self.bias_V.requires_grad)

    def detached(self) -> Head:
        """The same head, detached from autograd's graph."""
        bias_V = None if self.bias_V is None else self.bias_V.detach()
        return replace(self, weight_VD=self.weight_VD.detach(), bias_V=bias_V)

    def tile(self, num_tokens: int, streams: int, *, trains_weight: bool = False) -> Tile:
        """The `tile_of` this head, from the memory that the sweeps need.

        Each logit takes 4 bytes, and 4 more for its slope if logits are capped. Each column takes the cast copy of its
        weight, and if the weight is trained, its gradient and the share that is added to it.
        """
        # The entropy's copy of some rows is not counted: asking for the entropy must not change any bit of a log-prob.
        vocabulary, dim = self.weight_VD.shape
        return tile_of(
            num_tokens,
            streams,
            vocabulary,
            self.weight_VD.device,
            chunk_bytes=self.chunk_bytes,
            bytes_per_logit=4 * (1 + (self.transform.softcap is not None)),
            bytes_per_column=4 * dim * (must_be_cast(self.weight_VD) + 2 * trains_weight),
        )

    def vocabulary_tiles(self, width: int) -> Iterator[VocabularyTile]:
        """The tiles of `width` columns, in order; the last one may be narrower."""
        cast = must_be_cast(self.weight_VD)
        bias_V = None if self.bias_V is None else self.bias_V.contiguous()
        for first in range(0, self.weight_VD.shape[0], width):
            weight_WD = self.weight_VD[first : first + width]
            bias_W = None if bias_V is None else bias_V[first : first + width]
            yield VocabularyTile(first, weight_WD.float() if cast else weight_WD, bias_W)


@dataclass(frozen=True)
class Chunk:
    """Rows that go through each matmul together: one block of `block_rows` for each stream, padded at its end."""

    tokens: slice
    """The chunk's range of the call's N tokens."""
    num_tokens: int
    block_rows: int
    hidden_RD: Tensor
    targets_R: Tensor

    def rows_of(self, stream: int) -> slice:
        """The rows of one stream's tokens, without the padding."""
        first = stream * self.block_rows
        return slice(first, first + self.num_tokens)

    def first_rows(self, streams: int) -> int:
        """The number of rows from the first row to the last token of the first `streams` streams."""
        return self.rows_of(streams - 1).stop if streams else 0


def chunks_of(hidden_states: Seq[Tensor], targets_N: Tensor, rows: int) -> Iterator[Chunk]:
    """Chunks of `rows` tokens; a shorter last one is padded with zeros. All tensors of a chunk are contiguous.

    Args:
        hidden_states: of each stream, [N, D].
    """
    targets_N = targets_N.contiguous()  # the Triton kernels do not look at strides of targets
    like_ND = hidden_states[0]
    for first in range(0, len(targets_N), rows):
        tokens = slice(first, min(first + rows, len(targets_N)))
        targets_C = targets_N[tokens]
        num_tokens = len(targets_C)
        if len(hidden_states) == 1 and num_tokens == rows:
            hidden_RD, targets_R = like_ND[tokens], targets_C  # one full block needs no copy
        else:
            hidden_RD = like_ND.new_zeros(len(hidden_states) * rows, like_ND.shape[1])
            targets_R = targets_N.new_zeros(len(hidden_states) * rows)
            for number, hidden_ND in enumerate(hidden_states):
                block = slice(number * rows, number * rows + num_tokens)
                hidden_RD[block], targets_R[block] = hidden_ND[tokens], targets_C
        yield Chunk(tokens, num_tokens, rows, hidden_RD, targets_R)


def sweep_vocabulary(
    chunk: Chunk, head: Head, width: int, *, with_gradients: int, with_entropy: bool
) -> tuple[RowValues, Tensor | None]:
    """Compute the values of all rows over the vocabulary, and d logp / d hidden of the first `with_gradients` streams.

        d logp / d hidden = (others * weight[target] - sum_{v != target} e_v weight[v]) / total
        e_v = exp(z_v - highest)

    where `others` is the sum of the same e_v. Both sums are accumulated tile by tile and rescaled whenever a larger
    logit is found (online softmax, arXiv 2205.14135, section 3.1). If logits are capped or scaled, each weight is
    multiplied by d logit / d product.

    Returns:
        the values of all rows; and the gradients, [K, D] with K = `chunk.first_rows(with_gradients)`, or None if no
        stream has one.
    """
    dtype = accumulation_dtype(chunk.hidden_RD.dtype)
    device = chunk.hidden_RD.device
    sweeps = sweeps_for(device, dtype)
    sums = no_columns_yet(len(chunk.targets_R), dtype, device, with_entropy=with_entropy)
    kept_rows = chunk.first_rows(with_gradients)
    others_KD: Tensor | None = None
    for tile in head.vocabulary_tiles(width):
        exps_KW = sweeps.absorb_tile(
            mm_float32(chunk.hidden_RD, tile.weight_WD.T),
            chunk.targets_R,
            tile.first_token,
            sums,
            head.transform,
            bias_W=tile.bias_W,
            kept_rows=kept_rows,
            dtype=tile.weight_WD.dtype,
        )
        if not kept_rows:
            continue
        if others_KD is None:
            others_KD = mm_float32(exps_KW, tile.weight_WD)
        else:
            # Earlier tiles were computed relative to an older highest logit.
            others_KD.mul_(sums.rescale_R[:kept_rows, None])
            if exps_KW.dtype == others_KD.dtype:
                torch.addmm(others_KD, exps_KW, tile.weight_WD, out=others_KD)
            else:
                others_KD.add_(mm_float32(exps_KW, tile.weight_WD))
    values = values_of(sums)
    if others_KD is None:
        return values, None
    # The row of a target outside the vocabulary is already NaN. The index is clamped because on a GPU an index out of
    # range would destroy the CUDA context.
    inside_K = chunk.targets_R[:kept_rows].clamp(0, len(head.weight_VD) - 1)
    target_weight_KD = head.weight_VD.index_select(0, inside_K).to(dtype)
    rest_K = sums.others_R[:kept_rows] * head.transform.slope(sums.target_R[:kept_rows])
    return values, target_weight_KD.mul_(rest_K[:, None]).sub_(others_KD).div_(values.total_R[:kept_rows, None])
