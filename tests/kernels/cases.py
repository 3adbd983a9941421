"""Inputs for the log-prob kernels, the definition on them, and ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from uft_ds.kernels.chunks import Head
from uft_ds.kernels.forward import TokenStatistics
from uft_ds.kernels.frozen_head import attached, logps_and_gradients
from uft_ds.kernels.naive import naive_token_logps
from uft_ds.kernels.token_logps import token_logps
from uft_ds.kernels.trainable_head import differentiable_logps

SHAPES = [(1, 1, 2), (1, 16, 31), (7, 13, 97), (64, 32, 128), (127, 61, 1009), (3, 96, 2053)]
"""(N, D, V): one row, primes, powers of two, a vocabulary far larger than the rest."""

DTYPES = [torch.float32, torch.bfloat16]


EPSILON = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}
"""Half a unit in the last place, relative."""

SLACK = {torch.float32: 4.0, torch.bfloat16: 0.5}
"""Of the largest gradient, in EPSILON: float32 sums a vocabulary, bfloat16 is rounded after a float32 sum."""


@dataclass(frozen=True)
class Case:
    """The inputs of one call. Logits have a standard deviation of about 3, as those of trained models."""

    hidden_ND: Tensor
    weight_VD: Tensor
    targets_N: Tensor
    bias_V: Tensor | None
    upstream_N: Tensor


def make_case(shape: tuple[int, int, int], dtype: torch.dtype, *, with_bias: bool = False, seed: int = 0) -> Case:
    num_tokens, dim, vocabulary = shape
    generator = torch.Generator().manual_seed(seed)
    return Case(
        torch.randn(num_tokens, dim, generator=generator).to(dtype),
        (torch.randn(vocabulary, dim, generator=generator) * 3 / dim**0.5).to(dtype),
        torch.randint(vocabulary, (num_tokens,), generator=generator),
        torch.randn(vocabulary, generator=generator).to(dtype) if with_bias else None,
        torch.randn(num_tokens, generator=generator),
    )


def chunk_of(rows: int, vocabulary: int) -> int:
    """The `chunk_bytes` that holds the logits of `rows` rows. Fewer than 192 rows, or all, are cut by columns."""
    return rows * 4 * vocabulary


WHOLE, TILED = 2**30, 2**12
"""`chunk_bytes` for all logits at once, and for tiles of 16 columns or a few more."""

TRANSFORMS = [{}, {"scale": 0.25}, {"softcap": 5.0}, {"softcap": 4.0, "scale": -1.5, "temperature": 1.7}]


def naive(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Log-probs and d (upstream . log-probs) / d hidden by autograd through the definition, all in `dtype`."""
    hidden_ND = case.hidden_ND.clone().to(dtype).requires_grad_()
    bias_V = None if case.bias_V is None else case.bias_V.to(dtype)
    logps_N = naive_token_logps(hidden_ND, case.weight_VD.to(dtype), case.targets_N, bias_V)
    logps_N.backward(case.upstream_N.to(dtype))
    assert hidden_ND.grad is not None
    return logps_N.detach(), hidden_ND.grad


def ours(case: Case, **options: Any) -> tuple[Tensor, Tensor]:
    hidden_ND = case.hidden_ND.clone().requires_grad_()
    (logps_N,) = token_logps(hidden_ND, case.weight_VD, case.targets_N, bias=case.bias_V, **options)
    logps_N.backward(case.upstream_N)
    assert hidden_ND.grad is not None
    return logps_N.detach(), hidden_ND.grad


def logps_and_statistics(
    hidden_states: Sequence[Tensor], head: Head, targets_N: Tensor
) -> tuple[tuple[Tensor, ...], tuple[TokenStatistics, ...]]:
    """Log-probs and statistics of streams of which the first carries the gradient, through the calls a model makes."""
    if head.is_trained:
        output = differentiable_logps(hidden_states, head, targets_N, with_gradients=1, with_statistics=True)
        return output.logps, output.statistics
    with_gradients = int(hidden_states[0].requires_grad)
    output = logps_and_gradients(hidden_states, head, targets_N, with_gradients=with_gradients, with_statistics=True)
    return attached(hidden_states, output), output.statistics
