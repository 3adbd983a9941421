"""What of a layer is computed again in the backward pass: nothing, all of it, or what costs little.

    false      everything that the backward needs is kept
    selective  the results of wide matrix products (the frozen linear layers) and of the attention are kept; norms,
               activations, products, rotary positions and what adapters add are computed again
    true       only the inputs of layers are kept

With N frozen parameters, a token takes 4N operations of the policy with `false` and `selective`, and 6N with `true`.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

Recompute = bool | Literal["selective"]

_LINEAR = torch._C._nn.linear
_MATMULS = frozenset({"aten::mm", "aten::addmm"})
_COSTLY = frozenset(
    {
        "aten::_grouped_mm",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "aten::_scaled_dot_product_fused_attention_overrideable",
        "torch_attn::_varlen_attn",
        "flash_attn::_flash_attn_varlen_forward",
        "uft_ds::planned_flash",
    }
)
"""Operators by name, as not all exist in every installation: attention without a matrix of scores, and experts."""

_THIN = 12
"""A matmul whose inner dimension is more than this many times smaller than its result is wide costs little for what it
would take to keep: the second matrix of an adapter, unless the rank is a twelfth of the width."""


def enable_recompute(model: Any, mode: Recompute) -> None:
    """Let a transformers model compute its layers again in the backward pass; see the module.

    Raises:
        ValueError: the mode is selective, and another function is in the place of torch's linear layer. DeepSpeed's
            adds the bias in place (0.19.8), to the result that is kept: it would be added again in the backward pass.
    """
    if mode is False:
        return
    how: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        if nn.functional.linear is not _LINEAR:
            raise ValueError(f"selective recomputing needs torch's own linear layer, found {nn.functional.linear}")
        how["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = operator.name().removesuffix(".default") if isinstance(operator, torch._ops.OpOverload) else ""
    if name in _COSTLY:
        return CheckpointPolicy.MUST_SAVE
    if name in _MATMULS:
        left, right = args[-2:]
        if left.shape[-1] * _THIN >= right.shape[-1]:
            return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
