"""The plain definition of logits and token log-probs, against which the kernels are tested."""

from __future__ import annotations

import torch
from torch import Tensor


def naive_logits(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None = None,
    *,
    softcap: float | None = None,
    scale: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """The logits of all tokens: [N, V], in the inputs' dtype."""
    logits_NV = torch.nn.functional.linear(hidden_ND, weight_VD, bias_V)
    if scale is not None:
        logits_NV = scale * logits_NV
    if softcap is not None:
        logits_NV = softcap * torch.tanh(logits_NV / softcap)
    return logits_NV / temperature


def naive_token_logps(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    bias_V: Tensor | None = None,
    *,
    softcap: float | None = None,
    scale: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """log softmax(logits)[target] of each token: [N], nats, with all logits in memory at once."""
    logits_NV = naive_logits(hidden_ND, weight_VD, bias_V, softcap=softcap, scale=scale, temperature=temperature)
    return logits_NV.log_softmax(dim=-1).gather(1, targets_N[:, None]).squeeze(1)
