"""From hidden states to logits: the model's own scaling of them, and a matmul that accumulates in float32."""

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

    Granite and Cohere scale, Gemma 2 caps; sampling at a temperature divides.

    Raises:
        ValueError: a factor that is not finite, or not positive where it must be.
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
        return share.square_().neg_().add_(1).mul_(self.factor)


UNCHANGED = LogitTransform()
"""What most models do: nothing."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for whatever a model comes in; float64 inputs stay float64, so that they can be checked by gradcheck."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def must_be_cast(weight: Tensor) -> bool:
    """Whether matmuls need a float32 copy of the weight, made a tile at a time.

    CPUs have no matmul of half-precision inputs with float32 results. float16 has too short a range anywhere: what a
    tile of logits leaves behind goes into the next matmul in the weight's type, and 1e-8 is 0 there.
    """
    dtype = weight.dtype
    return dtype != accumulation_dtype(dtype) and not (weight.is_cuda and dtype == torch.bfloat16)


def mm_float32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, accumulated and returned in float32 (float64 for float64).

    A logit of 16 to 32 rounded to bfloat16 is off by up to 0.06 nats. Callers switch autocast off.
    """
    dtype = accumulation_dtype(a.dtype)
    if a.dtype == b.dtype == dtype:
        return a @ b
    if a.dtype == b.dtype and a.is_cuda:
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast would round the operands of every matmul to half precision."""
    return torch.autocast(device.type, enabled=False)
