"""From hidden states to logits: the model's own scaling of them, and a matmul that accumulates in float32."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LogitTransform:
    """logits = softcap * tanh(scale * (hidden @ weight^T + bias) / softcap) / temperature.

    Granite and Cohere scale, Gemma 2 caps; sampling at a temperature divides.

    Raises:
        ValueError: a factor that is not finite, or not positive where it must be.
    """

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale) or self.scale == 0:
            raise ValueError(f"scale: {self.scale}, expected a finite number other than 0")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"temperature: {self.temperature}, expected a positive number")
        if self.softcap is not None and not (math.isfinite(self.softcap) and self.softcap > 0):
            raise ValueError(f"softcap: {self.softcap}, expected a positive number, or None for no cap")

    @property
    def factor(self) -> float:
        """What multiplies the product where it is not capped, and its slope at 0 where it is."""
        return self.scale / self.temperature

    @property
    def bound(self) -> float | None:
        """The largest logit, where there is a cap."""
        return None if self.softcap is None else self.softcap / self.temperature

    def apply_(self, products_RW: Tensor, bias_W: Tensor | None = None) -> Tensor:
        """The logits, in the memory of the products."""
        if bias_W is not None:
            products_RW.add_(bias_W.to(products_RW.dtype))
        if self.softcap is not None and self.bound is not None:
            return products_RW.mul_(self.scale / self.softcap).tanh_().mul_(self.bound)
        return products_RW if self.factor == 1 else products_RW.mul_(self.factor)

    def slope(self, logits: Tensor) -> Tensor | float:
        """d logit / d (hidden @ weight^T), of the same shape, or one number for all."""
        if self.bound is None:
            return self.factor
        share = logits / self.bound
        return ((1 - share) * (1 + share)).mul_(self.factor)


UNCHANGED = LogitTransform()
"""What most models do: nothing."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for whatever a model comes in; float64 inputs stay float64, so that they can be checked by gradcheck."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def must_be_cast(weight: Tensor) -> bool:
    """CPUs have no matmul of half-precision inputs with float32 results: weights are cast, a tile at a time."""
    return not weight.is_cuda and weight.dtype != accumulation_dtype(weight.dtype)


def mm_float32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, accumulated and returned in float32: rounding a logit to bfloat16 costs 0.1 nat and more."""
    dtype = accumulation_dtype(a.dtype)
    if a.dtype == b.dtype == dtype:
        return a @ b
    if a.dtype == b.dtype and a.is_cuda:
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)
