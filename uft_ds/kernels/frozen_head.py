"""Log-probs of a head that is not trained: the hidden states' gradient is computed in the forward.

    d logp_n / d hidden_n = weight[target_n] - sum_v p_nv weight[v]

depends on the gradient from above by one factor per row. So it is computed where the logits are: two matmuls instead
of three, and the backward needs neither weights nor logits. Two halves, because of ZeRO-3: `logps_and_gradients` runs
without a graph inside the head's own forward, so that the head's weight is free again before the backward; `attached`
links its results to the hidden states outside.
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
    """Log-probs of all streams, row by row with the gradient of the first ones; nothing is linked to the hidden states.

    Peak memory over inputs and results: `head.chunk_bytes` for a tile, and of a chunk of C tokens up to C D numbers in
    float32 for the gradients of each stream that has them and a padded copy of all streams' hidden states.

    Args:
        hidden_states: of each stream, [N, D].
        with_gradients: of so many streams, from the first on.
    """
    output, _ = forward_pass(
        hidden_states, head, targets_N, with_gradients=with_gradients, with_statistics=with_statistics
    )
    return output


def attached(hidden_states: Seq[Tensor], output: HeadOutput) -> tuple[Tensor, ...]:
    """Each stream's log-probs, [N]: where the output has gradients, as a function of the stream's hidden states."""
    linked = tuple(
        _Attach.apply(hidden_ND, logps_N, gradients_ND)
        for hidden_ND, logps_N, gradients_ND in zip(hidden_states, output.logps, output.gradients, strict=False)
    )
    return linked + output.logps[len(linked) :]


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
