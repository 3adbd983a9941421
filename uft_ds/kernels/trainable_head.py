"""Log-probs of a head that is trained too: the backward computes the logits again.

The weight's gradient is a sum over tokens, each multiplied by its upstream gradient, so it cannot be computed in the
forward. This takes four matmuls: logits, logits again, the gradient of the hidden states, the gradient of the weight.

Runs that train all parameters take it; beside adapters the head is frozen.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from uft_ds.kernels.chunks import Chunk, Head, VocabularyTile, chunks_of
from uft_ds.kernels.forward import HeadOutput, forward_pass
from uft_ds.kernels.logits import LogitTransform, accumulation_dtype, mm_float32, without_autocast
from uft_ds.kernels.rows import RowValues, UpstreamRows
from uft_ds.kernels.sweeps import sweeps_for


def differentiable_logps(
    hidden_states: Seq[Tensor], head: Head, targets_N: Tensor, *, with_gradients: int, with_statistics: bool = False
) -> HeadOutput:
    """Log-probs of all streams; those of the first ones are linked to hidden states, weight and bias.

    The other streams use the weight's current values, so a reference with a different head needs a separate call. Under
    ZeRO-3 this must be called inside the module that owns the weight, with the parameter itself.

    Saved for the backward: hidden states, weight, bias and four numbers per token. Peak memory beyond inputs and
    results: `head.chunk_bytes` for a tile, which includes the tile's share of the weight, and the hidden states'
    gradient in float32.

    Args:
        hidden_states: of each stream, [N, D].
        with_gradients: the number of streams that carry a gradient; they come first.
    """
    output, streams = forward_pass(
        [hidden_ND.detach() for hidden_ND in hidden_states],
        head.detached(),
        targets_N,
        with_gradients=0,
        with_statistics=with_statistics,
    )
    linked = tuple(
        _Recomputed.apply(hidden_ND, head.weight_VD, head.bias_V, targets_N, values, head.transform, head.chunk_bytes)
        for hidden_ND, values in zip(hidden_states[:with_gradients], streams, strict=False)
    )
    return output._replace(logps=linked + output.logps[with_gradients:])


class _Recomputed(Function):
    """Links log-probs that are already computed to hidden states, weight and bias."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        values: RowValues,
        transform: LogitTransform,
        chunk_bytes: int | None,
    ) -> Tensor:
        # The parameters themselves are saved: ZeRO-3 frees their data after the forward and gathers it again before the
        # backward.
        ctx.save_for_backward(
            hidden_ND, weight_VD, bias_V, targets_N, values.highest_R, values.others_R, values.total_R
        )
        ctx.transform, ctx.chunk_bytes = transform, chunk_bytes
        return values.logps_R.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream_N: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_VD, bias_V, targets_N, highest_N, others_N, total_N = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        head = Head(weight_VD, bias_V, ctx.transform, ctx.chunk_bytes)
        tile = head.tile(len(targets_N), 1, trains_weight=wants_weight)
        chunks = list(chunks_of([hidden_ND], targets_N, tile.rows))
        dtype = accumulation_dtype(hidden_ND.dtype)
        sweeps = sweeps_for(hidden_ND.device, dtype)
        rows = UpstreamRows(highest_N, others_N, upstream_N / total_N)
        grads = _Gradients(
            torch.zeros_like(hidden_ND, dtype=dtype) if wants_hidden else None,
            torch.empty_like(weight_VD) if wants_weight else None,
            torch.empty_like(bias_V) if wants_bias else None,
        )
        with without_autocast(hidden_ND.device):
            for part in head.vocabulary_tiles(tile.width):
                _add_tile(part, chunks, rows, grads, ctx.transform, sweeps)
        grad_hidden_ND = None if grads.hidden_ND is None else grads.hidden_ND.to(hidden_ND.dtype)
        return grad_hidden_ND, grads.weight_VD, grads.bias_V, *[None] * 4


class _Gradients(NamedTuple):
    """The gradients that a backward computes; None for an input that needs none."""

    hidden_ND: Tensor | None
    """float32, accumulated over tiles."""
    weight_VD: Tensor | None
    bias_V: Tensor | None


def _add_tile(
    part: VocabularyTile,
    chunks: list[Chunk],
    rows: UpstreamRows,
    grads: _Gradients,
    transform: LogitTransform,
    sweeps: ModuleType,
) -> None:
    """Add a tile's share to the hidden states' gradient, and write its rows of the weight's and bias's gradients.

    All tokens pass through one tile before the next tile, so that the weight's gradient is summed in float32 and only
    one tile of that sum is in memory.
    """
    grad_weight_WD, grad_bias_W = None, None
    for chunk in chunks:
        tokens, num_tokens = chunk.tokens, chunk.num_tokens
        residuals_CW = sweeps.residuals(
            mm_float32(chunk.hidden_RD, part.weight_WD.T)[:num_tokens],
            chunk.targets_R[:num_tokens],
            part.first_token,
            rows.at(tokens),
            transform,
            bias_W=part.bias_W,
            dtype=part.weight_WD.dtype,
        )
        if grads.hidden_ND is not None:
            grads.hidden_ND[tokens] += mm_float32(residuals_CW, part.weight_WD)
        if grads.weight_VD is not None:
            share_WD = mm_float32(residuals_CW.T, chunk.hidden_RD[:num_tokens].to(residuals_CW.dtype))
            grad_weight_WD = share_WD if grad_weight_WD is None else grad_weight_WD.add_(share_WD)
        if grads.bias_V is not None:
            share_W = residuals_CW.sum(dim=0, dtype=accumulation_dtype(residuals_CW.dtype))
            grad_bias_W = share_W if grad_bias_W is None else grad_bias_W.add_(share_W)
    if grads.weight_VD is not None:
        grads.weight_VD[part.tokens] = 0 if grad_weight_WD is None else grad_weight_WD
    if grads.bias_V is not None:
        grads.bias_V[part.tokens] = 0 if grad_bias_W is None else grad_bias_W
