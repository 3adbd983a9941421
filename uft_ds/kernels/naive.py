"""The definition that the kernels are tested against."""

from __future__ import annotations

import torch
from torch import Tensor


def naive_token_logps(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, bias_V: Tensor | None = None) -> Tensor:
    """log softmax(hidden @ weight^T + bias)[target], with all logits in memory at once."""
    logits_NV = torch.nn.functional.linear(hidden_ND, weight_VD, bias_V)
    return logits_NV.log_softmax(dim=-1).gather(1, targets_N[:, None]).squeeze(1)
