"""Linear layers that save for the backward no more than their gradients need.

A frozen weight has no gradient, so the input of its layer is not needed. Its adapter reads the same input. DeepSpeed's
own linear function (0.19.8) saves the input of every layer, and PEFT (0.21) converts it to the adapter's type before,
once for each adapter: with float32 adapters on q, k and v of a bfloat16 base, autograd keeps four copies of one tensor,
three of them twice as large.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd.function import Function

_LINEAR = torch._C._nn.linear
"""torch's own: DeepSpeed may have put another function in the place of `torch.nn.functional.linear`."""


class LeanLinear(nn.Linear):
    """A linear layer, frozen or trained. Not for autocast, which no run uses."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that torch gives it
        result: Tensor = _Lean.apply(input, self.weight, self.bias)
        return result


class LeanAdapter(LeanLinear):
    """A matrix of an adapter: its input is converted to its own type, as PEFT does."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        result: Tensor = _Lean.apply(input, self.weight, self.bias, True)
        return result


def enable_lean_linear(decoder: nn.Module) -> None:
    """Let a decoder's linear layers, and those of its adapters, save as little as they can; values stay as they are."""
    for layer in [module for module in decoder.modules() if isinstance(module, LoraLayer)]:
        layer.cast_input_dtype_enabled = False  # `LeanAdapter` converts; what is saved is shared with the base's layers
        for matrix in (*layer.lora_A.values(), *layer.lora_B.values()):
            if type(matrix) is nn.Linear:
                matrix.__class__ = LeanAdapter
    for module in decoder.modules():
        if type(module) is nn.Linear:
            module.__class__ = LeanLinear


class _Lean(Function):
    @staticmethod
    def forward(ctx: Any, given: Tensor, weight: Tensor, bias: Tensor | None, converts: bool = False) -> Tensor:
        # The weight is saved as the parameter that it is: under ZeRO-3 its data is gathered again before the backward.
        # A transposed view, which autograd would save, keeps the gathered data instead.
        ctx.save_for_backward(weight, given if weight.requires_grad else None)
        ctx.given_dtype = given.dtype
        result: Tensor = _LINEAR(given.to(weight.dtype) if converts else given, weight, bias)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        (gradient,) = gradients
        weight, given = ctx.saved_tensors
        of_input, of_weight, of_bias, *_ = ctx.needs_input_grad
        rows = gradient.reshape(-1, gradient.shape[-1])
        return (
            gradient.matmul(weight).to(ctx.given_dtype) if of_input else None,
            rows.t().matmul(given.to(weight.dtype).reshape(-1, given.shape[-1])) if of_weight else None,
            rows.sum(0) if of_bias else None,
            None,
        )
