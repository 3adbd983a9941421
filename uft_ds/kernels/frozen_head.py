"""Log-probs of a head that is not trained: the hidden states' gradient is computed in the forward.

    d logp_n / d hidden_n = weight[target_n] - sum_v p_nv weight[v]

depends on the gradient from above by one factor per row. So it is computed where the logits are: two matmuls instead
of three, and the backward needs neither weights nor logits. Two halves, because of ZeRO-3: `logps_and_gradients` runs
without a graph inside the head's own forward, so that the head's weight is free again before the backward; `attach`
links its results to the hidden states outside.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from uft_ds.kernels.chunks import Head
from uft_ds.kernels.forward import HeadOutput, forward_pass
from uft_ds.kernels.logits import UNCHANGED, LogitTransform


def logps_and_gradients(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    reference_hidden_ND: Tensor | None = None,
    bias_V: Tensor | None = None,
    transform: LogitTransform = UNCHANGED,
    with_gradients: bool = True,
    with_statistics: bool = False,
    chunk_bytes: int | None = None,
) -> HeadOutput:
    """Log-probs of both streams, row by row with the policy's gradient; nothing is linked to the hidden states.

    Peak memory over inputs and results: `chunk_bytes` for a tile, and of a chunk of C tokens up to 3 C D numbers in
    float32 for its gradients and a padded copy of its hidden states, of both streams.
    """
    output, _ = forward_pass(
        hidden_ND,
        Head(weight_VD, bias_V, transform),
        targets_N,
        reference_hidden_ND,
        with_gradients=with_gradients,
        with_statistics=with_statistics,
        chunk_bytes=chunk_bytes,
    )
    return output


def attach(hidden_ND: Tensor, logps_N: Tensor, gradients_ND: Tensor) -> Tensor:
    """`logps_N` as a function of `hidden_ND` whose derivative, row by row, is `gradients_ND`."""
    attached: Tensor = _Attach.apply(hidden_ND, logps_N, gradients_ND)
    return attached


class _Attach(Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, logps_N: Tensor, gradients_ND: Tensor) -> Tensor:
        ctx.save_for_backward(gradients_ND)
        return logps_N.clone()

    @staticmethod
    @once_differentiable  # the stored gradients are constants to autograd
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None, None]:
        (gradients_ND,) = ctx.saved_tensors
        return (grad_N[:, None] * gradients_ND).to(gradients_ND.dtype), None, None
