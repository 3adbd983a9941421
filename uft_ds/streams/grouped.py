"""Routed experts by grouped products that save no gathered weight.

transformers computes a mixture's experts by torch's `grouped_mm` with a transposed view of the weights, and autograd
saves that view (transformers 5.23, torch 2.13). Under ZeRO-3 it keeps a layer's gathered experts until the backward:
without gradient checkpointing each rank would hold all experts of all layers. Here the parameter itself is saved, whose
data is gathered again, as `streams.linear` does for linear layers. The values are transformers' to the bit.

T tokens, S pairs of a token and one of its experts, E experts, D hidden size, I inner size of an expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor, nn
from torch.autograd.function import Function
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

LEAN_EXPERTS = "uft_lean"
"""The name in transformers' registry of implementations of experts."""
_OF_TRANSFORMERS = "grouped_mm"
_STATED = {
    "has_gate": True,
    "has_bias": False,
    "is_transposed": False,
    "is_concatenated": True,
    "has_post_expert_norm": False,
    "_is_expert_parallel": False,
}
"""What transformers says of a module of experts that computes as `lean_experts` does."""
_ON_CPUS = Version("2.11")
"""torch before it wants weights at addresses that a shard's end need not have."""


def enable_lean_experts(decoder: nn.Module) -> None:
    """Let a decoder's routed experts be computed by `lean_experts`, where transformers would take `grouped_mm`."""
    config: Any = decoder.config
    experts = [module for module in decoder.modules() if hasattr(module, "_is_expert_parallel")]
    are_alike = all(getattr(module, key, None) == value for module in experts for key, value in _STATED.items())
    if experts and are_alike and config._experts_implementation == _OF_TRANSFORMERS and _has_grouped_mm():
        config._experts_implementation = LEAN_EXPERTS


def _has_grouped_mm() -> bool:
    if torch.cuda.is_available():
        return torch.cuda.get_device_capability() >= (8, 0)
    return Version(torch.__version__).release >= _ON_CPUS.release


@contextmanager
def experts_of_transformers(model: Any) -> Iterator[None]:
    """Within the block, a model computes its experts by transformers' own function."""
    config = model.get_decoder().config
    before = getattr(config, "_experts_implementation", None)
    if before == LEAN_EXPERTS:
        config._experts_implementation = _OF_TRANSFORMERS
    try:
        yield
    finally:
        if before == LEAN_EXPERTS:
            config._experts_implementation = before


def lean_experts(module: Any, hidden_TD: Tensor, experts_Tk: Tensor, weights_Tk: Tensor) -> Tensor:
    """What a module of experts adds to the hidden states: [tokens, hidden].

    Args:
        experts_Tk: the experts of each token. weights_Tk: what their outputs are multiplied with.
    """
    tokens, chosen = experts_Tk.shape
    experts_S, order_S = torch.sort(experts_Tk.reshape(-1))
    # The sums of 0 and 1 count as bincount does, which waits for the device.
    counts_E = torch.histc(
        experts_S.float() if experts_S.device.type == "cpu" else experts_S.int(),
        bins=module.num_experts,
        min=0,
        max=module.num_experts - 1,
    )
    ends_E = torch.cumsum(counts_E, dim=0, dtype=torch.int32)
    gate_up_SI: Tensor = _Grouped.apply(hidden_TD[order_S // chosen], module.gate_up_proj, ends_E)
    out_SD: Tensor = _Grouped.apply(module._apply_gate(gate_up_SI), module.down_proj, ends_E)
    weighted_SD = out_SD * weights_Tk.reshape(-1)[order_S, None]
    places_S = torch.empty_like(order_S)
    places_S[order_S] = torch.arange(len(order_S), device=order_S.device)
    # A sum over each token's own rows: adding rows at indices is in no fixed order on GPUs.
    summed_TD = weighted_SD[places_S].view(tokens, chosen, -1).sum(dim=1)
    return summed_TD.to(hidden_TD.dtype)


ALL_EXPERTS_FUNCTIONS.register(LEAN_EXPERTS, lean_experts)


class _Grouped(Function):
    """rows of each expert @ its weight^T. rows: [S, in], sorted by experts; weights: [E, out, in]; ends of the rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, ends_E: Tensor) -> Tensor:
        ctx.save_for_backward(weights, rows if weights.requires_grad else None, ends_E)
        return grouped_product(rows.to(weights.dtype), weights.transpose(-2, -1), ends_E)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (gradient,) = gradients
        weights, rows, ends_E = ctx.saved_tensors
        of_rows, of_weights, _ = ctx.needs_input_grad
        return (
            grouped_product(gradient, weights, ends_E) if of_rows else None,
            grouped_product(gradient.transpose(0, 1), rows.to(weights.dtype), ends_E) if of_weights else None,
            None,
        )


def grouped_product(left: Tensor, right: Tensor, ends_E: Tensor) -> Tensor:
    """torch's; a plan replaces it by one for tensors without values."""
    return nn.functional.grouped_mm(left, right, offs=ends_E)
