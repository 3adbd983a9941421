"""From hidden states to logits: the model's scaling and capping of logits, and a matmul that accumulates in float32."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class LogitTransform:
    """logits = softcap * tanh(scale * (hidden @ weight^T + bias) / softcap) / temperature.

    Granite and Cohere scale their logits, Gemma 2 caps them, and sampling divides them by a temperature.

    Raises:
        ValueError: a factor is not finite, the scale is 0, or the temperature or cap is not positive.
    """

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not _is_finite(self.scale) or self.scale == 0:
            raise ValueError(f"scale: {self.scale!r}, expected a finite number other than 0, or None")
        if not _is_finite(self.temperature) or self.temperature <= 0:
            raise ValueError(f"temperature: {self.temperature!r}, expected a positive number")
        if self.softcap is not None and (not _is_finite(self.softcap) or self.softcap <= 0):
            raise ValueError(f"softcap: {self.softcap!r}, expected a positive number, or None for no cap")

    @property
    def factor(self) -> float:
        """d logit / d product at 0; without a cap it is the same everywhere."""
        return self.scale / self.temperature

    @property
    def bound(self) -> float | None:
        """The largest possible logit; None without a cap."""
        return None if self.softcap is None else self.softcap / self.temperature

    def apply_(self, products_RW: Tensor, bias_W: Tensor | None = None) -> Tensor:
        """The logits, computed in place in the memory of the products."""
        if bias_W is not None:
            products_RW.add_(bias_W.to(products_RW.dtype))
        if self.softcap is not None and self.bound is not None:
            return products_RW.mul_(self.scale / self.softcap).tanh_().mul_(self.bound)
        return products_RW if self.factor == 1 else products_RW.mul_(self.factor)

    def slope(self, logits: Tensor) -> Tensor | float:
        """d logit / d (hidden @ weight^T): a tensor of the same shape; without a cap one number for all logits."""
        if self.bound is None:
            return self.factor
        # d tanh(x) = 1 - tanh(x)^2, and logits / bound is the tanh.
        share = logits / self.bound
        return share.square_().neg_().add_(1).mul_(self.factor)


UNCHANGED = LogitTransform()
"""The transform of most models, which leaves logits unchanged."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for all model dtypes; float64 stays float64, so that gradcheck can test the code."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def must_be_cast(weight: Tensor) -> bool:
    """Whether matmuls need a float32 copy of the weight, which is made tile by tile.

    A CPU has no matmul of half-precision inputs with float32 results. float16 needs the copy on every device, because
    its range is too small: the exponentials of a tile enter the next matmul in the weight's dtype, and 1e-8 would
    become 0.
    """
    dtype = weight.dtype
    return dtype != accumulation_dtype(dtype) and not (weight.is_cuda and dtype == torch.bfloat16)


def mm_float32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, accumulated and returned in float32 (float64 for float64 inputs). Callers must switch autocast off.

    Rounding a logit between 16 and 32 to bfloat16 would change it by up to 0.06 nats.
    """
    dtype = accumulation_dtype(a.dtype)
    if a.dtype == b.dtype == dtype:
        return a @ b
    if a.dtype == b.dtype and a.is_cuda:
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Within the block, autocast is off: it would round the operands of every matmul to half precision."""
    return torch.autocast(device.type, enabled=False)
