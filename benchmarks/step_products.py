"""How much of a step its matrix products take, and so what is left to save.

Not a benchmark itself.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
"""torch's operators of matrix products, into which linear layers, adapters and heads are resolved; not attention."""
ATTENTION = "scaled_dot_product"
"""In the names of torch's operators of attention, forward and backward."""
REPEATS = 3

Shape: TypeAlias = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]
"""Sizes, strides and type of a matrix."""
Product: TypeAlias = tuple[Any, tuple[Shape, ...]]
"""An operator and its matrices."""


class _Noted(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[Product] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in PRODUCTS:
            matrices = [matrix for matrix in args if isinstance(matrix, Tensor)]
            shapes = tuple((tuple(matrix.shape), matrix.stride(), matrix.dtype) for matrix in matrices)
            self.count[getattr(torch.ops.aten, name).default, shapes] += 1
        return func(*args, **(kwargs or {}))


def products_of(step: Callable[[], object]) -> Counter[Product]:
    """How often a call computes each product, in its forward and in its backward."""
    with _Noted() as noted:
        step()
    return noted.count


def seconds_of(products: Counter[Product]) -> float:
    """The least time for all these products, each measured alone, the fastest of some times, on matrices of the same
    sizes and strides."""
    total = 0.0
    for (operator, shapes), times in products.items():
        matrices = [_matrix(shape) for shape in shapes]
        fastest = float("inf")
        for _ in range(REPEATS):
            started = time.perf_counter()
            operator(*matrices)
            fastest = min(fastest, time.perf_counter() - started)
        total += times * fastest
    return total


def share_in_step(step: Callable[[], object]) -> float:
    """Of the time of a call, what its products and its attention take in it, as torch's profiler counts them.

    More than they take alone: what a step gathers and keeps is no longer in a cache, and another rank uses the same
    memory.
    """
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        started = time.perf_counter()
        step()
        seconds = time.perf_counter() - started
    return sum(event.self_cpu_time_total for event in profiled.key_averages() if _computes(event.key)) / 1e6 / seconds


def _computes(operator: str) -> bool:
    return operator.removeprefix("aten::") in PRODUCTS or ATTENTION in operator


def _matrix(shape: Shape) -> Tensor:
    sizes, strides, dtype = shape
    return torch.empty_strided(sizes, strides, dtype=dtype).normal_()
