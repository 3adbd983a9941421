"""Log-probs of a head that is trained too: its backward computes the logits again.

A weight's gradient sums over tokens, each times its gradient from above, so none of it can be computed before that is
known. Four matmuls: logits, logits again, the gradient of the hidden states, the gradient of the weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from uft_ds.kernels.chunks import Head, chunks_of
from uft_ds.kernels.forward import HeadOutput, forward_pass
from uft_ds.kernels.logits import UNCHANGED, LogitTransform, accumulation_dtype, mm_float32
from uft_ds.kernels.rows import sweeps_for


def differentiable_logps(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    reference_hidden_ND: Tensor | None = None,
    bias_V: Tensor | None = None,
    transform: LogitTransform = UNCHANGED,
    with_statistics: bool = False,
    chunk_bytes: int | None = None,
) -> HeadOutput:
    """Log-probs of both streams, the policy's as a function of hidden states, weight and bias.

    The reference's rows go through the weight as it is now: a reference with a head of its own needs a call of its
    own. Under ZeRO-3 this must be called inside the module that owns the weight, with the parameter itself.
    """
    output, policy = forward_pass(
        hidden_ND.detach(),
        Head(weight_VD.detach(), None if bias_V is None else bias_V.detach(), transform),
        targets_N,
        reference_hidden_ND,
        with_gradients=False,
        with_statistics=with_statistics,
        chunk_bytes=chunk_bytes,
    )
    sums = (policy.logps_R, policy.highest_R, policy.others_R, policy.total_R)
    logps_N = _Recomputed.apply(hidden_ND, weight_VD, bias_V, targets_N, *sums, transform, chunk_bytes)
    return output._replace(logps_N=logps_N)


class _Recomputed(Function):
    """Links log-probs that are known already to what they were computed from."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        logps_N: Tensor,
        highest_N: Tensor,
        others_N: Tensor,
        total_N: Tensor,
        transform: LogitTransform,
        chunk_bytes: int | None,
    ) -> Tensor:
        # The parameters themselves: ZeRO-3 frees their data after this and gathers it again before the backward.
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, targets_N, highest_N, others_N, total_N)
        ctx.transform, ctx.chunk_bytes = transform, chunk_bytes
        return logps_N.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream_N: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_VD, bias_V, targets_N, highest_N, others_N, total_N = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        head = Head(weight_VD, bias_V, ctx.transform)
        tile = head.tile(len(targets_N), 1, ctx.chunk_bytes)
        dtype = accumulation_dtype(hidden_ND.dtype)
        grad_hidden_ND = torch.zeros_like(hidden_ND, dtype=dtype) if wants_hidden else None
        grad_weight_VD = torch.empty_like(weight_VD) if wants_weight else None
        grad_bias_V = torch.empty_like(bias_V) if wants_bias else None
        scales_N = upstream_N / total_N
        sweeps = sweeps_for(hidden_ND.device)
        # Tiles of the vocabulary outside, so that each row of the weight's gradient is finished in one visit.
        for part in head.vocabulary_tiles(tile.width):
            grad_weight_WD = torch.zeros_like(part.weight_WD, dtype=dtype) if wants_weight else None
            grad_bias_W = part.weight_WD.new_zeros(len(part.weight_WD), dtype=dtype) if wants_bias else None
            for chunk in chunks_of(hidden_ND, targets_N, None, tile.rows):
                tokens, rows = chunk.tokens, chunk.policy_rows
                residuals_CW = sweeps.residuals(
                    mm_float32(chunk.hidden_RD, part.weight_WD.T)[rows],
                    targets_N[tokens],
                    part.first_token,
                    highest_N[tokens],
                    others_N[tokens],
                    scales_N[tokens],
                    ctx.transform,
                    bias_W=part.bias_W,
                    dtype=part.weight_WD.dtype,
                )
                if grad_hidden_ND is not None:
                    grad_hidden_ND[tokens] += mm_float32(residuals_CW, part.weight_WD)
                if grad_weight_WD is not None:
                    grad_weight_WD += mm_float32(residuals_CW.T, hidden_ND[tokens].to(residuals_CW.dtype))
                if grad_bias_W is not None:
                    grad_bias_W += residuals_CW.sum(dim=0, dtype=dtype)
            if grad_weight_VD is not None and grad_weight_WD is not None:
                grad_weight_VD[part.tokens] = grad_weight_WD
            if grad_bias_V is not None and grad_bias_W is not None:
                grad_bias_V[part.tokens] = grad_bias_W
        grad_hidden_ND = None if grad_hidden_ND is None else grad_hidden_ND.to(hidden_ND.dtype)
        return grad_hidden_ND, grad_weight_VD, grad_bias_V, *[None] * 7
