"""Per-token log-probabilities from hidden states, without ever holding all logits.

N supervised tokens, D hidden size, V vocabulary. Two halves, because of ZeRO-3: `logps_and_gradients` runs
without a graph inside the head's own forward, so that the head's weight is free again before the backward;
`attach` links its results to the hidden states outside.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

DEFAULT_CHUNK_BYTES = 64 * 2**20


def token_logps(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    reference_hidden_ND: Tensor | None = None,
    bias_V: Tensor | None = None,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
) -> tuple[Tensor, Tensor | None]:
    """`naive_token_logps` for the policy, with gradient, and for the reference, without.

    The head is frozen: no gradient flows to `weight_VD`. Peak memory over the inputs: one chunk of logits
    (`chunk_bytes`) twice, and the row gradients [N, D] in the hidden states' dtype.

    Returns:
        policy and reference log-probs, [supervised tokens], float32, nats.
    """
    logps_N, gradients_ND, reference_logps_N = logps_and_gradients(
        hidden_ND.detach(),
        weight_VD.detach(),
        targets_N,
        reference_hidden_ND=reference_hidden_ND,
        bias_V=bias_V,
        chunk_bytes=chunk_bytes,
    )
    assert gradients_ND is not None
    return attach(hidden_ND, logps_N, gradients_ND), reference_logps_N


@torch.no_grad()
def logps_and_gradients(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    reference_hidden_ND: Tensor | None = None,
    bias_V: Tensor | None = None,
    with_gradients: bool = True,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Log-probs of both streams and d logp / d hidden of the policy's, chunk by chunk of rows.

        d logp_n / d hidden_n = weight[target_n] - sum_v p_nv weight[v]

    does not depend on the gradient from above but for a factor per row, so it is computed here, where the
    logits are, and the backward needs neither the weight nor the logits again.
    """
    num_tokens = targets_N.numel()
    logps_N = torch.empty(num_tokens, dtype=torch.float32, device=hidden_ND.device)
    gradients_ND = torch.empty_like(hidden_ND) if with_gradients else None
    reference_logps_N = None if reference_hidden_ND is None else torch.empty_like(logps_N)
    rows = max(1, chunk_bytes // (4 * weight_VD.shape[0]))
    for start in range(0, num_tokens, rows):
        chunk = slice(start, start + rows)
        targets_C = targets_N[chunk, None]
        logits_CV = _logits(hidden_ND[chunk], weight_VD, bias_V)
        log_normalizer_C = logits_CV.logsumexp(dim=-1, keepdim=True)
        logps_N[chunk] = (logits_CV.gather(1, targets_C) - log_normalizer_C).squeeze(1)
        if gradients_ND is not None:
            residual_CV = logits_CV.sub_(log_normalizer_C).exp_().neg_()  # onehot - p, in the logits' memory
            rows_C = torch.arange(len(targets_C), device=targets_C.device)
            residual_CV[rows_C, targets_C.squeeze(1)] += 1  # not scatter_add_, not deterministic on GPUs
            gradients_ND[chunk] = residual_CV.to(weight_VD.dtype) @ weight_VD
        if reference_hidden_ND is not None and reference_logps_N is not None:
            logits_CV = _logits(reference_hidden_ND[chunk], weight_VD, bias_V)
            log_normalizer_C = logits_CV.logsumexp(dim=-1, keepdim=True)
            reference_logps_N[chunk] = (logits_CV.gather(1, targets_C) - log_normalizer_C).squeeze(1)
    return logps_N, gradients_ND, reference_logps_N


def attach(hidden_ND: Tensor, logps_N: Tensor, gradients_ND: Tensor) -> Tensor:
    """`logps_N` as a function of `hidden_ND` whose derivative, row by row, is `gradients_ND`."""
    attached: Tensor = _Attach.apply(hidden_ND, logps_N, gradients_ND)
    return attached


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, logps_N: Tensor, gradients_ND: Tensor) -> Tensor:
        ctx.save_for_backward(gradients_ND)
        return logps_N.clone()

    @staticmethod
    @once_differentiable  # the stored gradients are constants to autograd
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None, None]:
        (gradients_ND,) = ctx.saved_tensors
        return (grad_N[:, None] * gradients_ND).to(gradients_ND.dtype), None, None


def _logits(hidden_CD: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Tensor:
    """[chunk, vocabulary] in float32, accumulated in float32: rounding logits to bf16 costs 0.1 nat and more."""
    if weight_VD.dtype == torch.float32:
        logits_CV = hidden_CD @ weight_VD.T
    elif weight_VD.is_cuda:
        logits_CV = torch.mm(hidden_CD, weight_VD.T, out_dtype=torch.float32)
    else:
        logits_CV = hidden_CD.float() @ weight_VD.float().T
    return logits_CV if bias_V is None else logits_CV.add_(bias_V.float())
