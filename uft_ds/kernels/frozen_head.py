"""Log-probs of a head that is not trained: the gradient of the hidden states is computed in the forward pass.

    d logp_n / d hidden_n = weight[target_n] - sum_v p_nv weight[v]

The upstream gradient only multiplies each row by one number. So this is computed as soon as the logits exist: two
matmuls instead of three, and the backward needs neither weights nor logits. There are two functions because of ZeRO-3:
`logps_and_gradients` runs without a graph inside the head's own forward, so the head's gathered weight is released
before the backward; `attached` links its results to the hidden states outside the head.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from uft_ds.kernels.chunks import Head
from uft_ds.kernels.forward import HeadOutput, forward_pass


def logps_and_gradients(
    hidden_states: Seq[Tensor],
    head: Head,
    targets_N: Tensor,
    *,
    with_gradients: int,
    with_statistics: bool = False,
) -> HeadOutput:
    """Log-probs of all streams and the gradients of the first ones, without a graph.

    Peak memory beyond inputs and results: `head.chunk_bytes` for a tile; and for a chunk of C tokens, C * D float32
    numbers for each stream with gradients and a padded copy of all streams' hidden states.

    Args:
        hidden_states: of each stream, [N, D].
        with_gradients: the number of streams whose gradients are computed; they come first.
    Raises:
        ValueError, IndexError: as `forward_pass`.
    """
    output, _ = forward_pass(
        hidden_states, head, targets_N, with_gradients=with_gradients, with_statistics=with_statistics
    )
    return output


def attached(hidden_states: Seq[Tensor], output: HeadOutput) -> tuple[Tensor, ...]:
    """Each stream's log-probs, [N]; those with gradients in the output are linked to the stream's hidden states."""
    linked = tuple(
        _Attach.apply(hidden_ND, logps_N, gradients_ND)
        for hidden_ND, logps_N, gradients_ND in zip(hidden_states, output.logps, output.gradients, strict=False)
    )
    return linked + output.logps[len(linked) :]


class _Attach(Function):
    """Log-probs with a known gradient, as a function of the hidden states."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, logps_N: Tensor, gradients_ND: Tensor) -> Tensor:
        ctx.save_for_backward(gradients_ND)
        return logps_N.clone()

    @staticmethod
    @once_differentiable  # the stored gradients are constants to autograd
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None, None]:
        (gradients_ND,) = ctx.saved_tensors
        return (grad_N[:, None] * gradients_ND).to(gradients_ND.dtype), None, None
