"""flash-attn's variable-length attention in plain torch, under its own names and signatures, for tests on a CPU.

It checks what flash-attn's kernel takes for granted, except half precision: transformers casts to the dtype of the
model's weights, so that a float32 model reaches it in float32, and tests can compare in float32.
"""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers.modeling_flash_attention_utils as hf_flash
from torch import Tensor

DERIVED_BY_TRANSFORMERS = ("prepare_fa_kwargs_from_position_ids", "_prepare_from_posids", "_is_packed_sequence")
"""What transformers calls in every layer that is not told where sequences begin; each waits for the device."""

LOADED_BY_TRANSFORMERS = (
    "_loaded_implementation",
    "_flash_fn",
    "_flash_varlen_fn",
    "_flash_with_kvcache_fn",
    "_pad_fn",
    "_unpad_fn",
    "_process_flash_kwargs_fn",
    "_process_with_kvcache_kwargs_fn",
)
"""Its globals, filled at the first load of a flash-attn."""


@dataclass(frozen=True, eq=False)
class Call:
    """One call of `flash_attn_varlen_func`."""

    bounds_q: Tensor
    bounds_k: Tensor
    longest_q: Any
    longest_k: Any
    dtype: torch.dtype
    window: tuple[int, int]
    records_gradient: bool


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor:
    """Attention within each sequence, in float64: [tokens, heads, head_dim], in the dtype of q."""
    assert q.ndim == k.ndim == v.ndim == 3
    assert q.dtype == k.dtype == v.dtype
    assert len(q) == len(k) == len(v), "only self-attention is stood in for"
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert cu_seqlens_q.is_contiguous()
    assert cu_seqlens_k.is_contiguous()
    assert type(max_seqlen_q) is type(max_seqlen_k) is int, "a tensor would be waited for"
    assert (dropout_p, alibi_slopes, return_attn_probs, block_table) == (0.0, None, False, None)
    bounds = cu_seqlens_q.tolist()
    assert bounds == cu_seqlens_k.tolist()
    assert (bounds[0], bounds[-1]) == (0, len(q))
    # The kernel's grid covers this many queries of each sequence, and leaves the rest unwritten.
    assert max(end - start for start, end in pairwise(bounds)) <= min(max_seqlen_q, max_seqlen_k)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    outputs = []
    for start, end in pairwise(bounds):
        queries, keys, values = (x[start:end].double().transpose(0, 1) for x in (q, k, v))
        scores = queries @ keys.transpose(1, 2) * scale
        if softcap:
            scores = softcap * (scores / softcap).tanh()
        scores = scores.masked_fill(~_visible(end - start, causal, window_size), -torch.inf)
        outputs.append((scores.softmax(-1) @ values).transpose(0, 1))
    return torch.cat(outputs).to(q.dtype)


def _visible(length: int, causal: bool, window: tuple[int, int]) -> Tensor:
    """[queries, keys]: at most window[0] back and window[1] ahead, both included; -1 is no limit."""
    ahead = torch.arange(length)[None, :] - torch.arange(length)[:, None]
    left, right = window
    right = 0 if causal else right
    visible = torch.ones(length, length, dtype=torch.bool)
    if left >= 0:
        visible &= ahead >= -left
    if right >= 0:
        visible &= ahead <= right
    return visible


def _not_packed(*args: Any, **kwargs: Any) -> Tensor:
    raise AssertionError("the variable-length function was not used")


def _no_derivation(name: str) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError(f"transformers derived the sequences' bounds itself, by {name}")

    return refuse


def _module(name: str, **members: Any) -> ModuleType:
    module = ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, loader=None)
    vars(module).update(members)
    return module


@contextmanager
def installed() -> Iterator[list[Call]]:
    """Within the block transformers finds this flash-attn, and may not derive bounds; gives the calls."""
    calls: list[Call] = []

    # transformers reads the signature, to know which options there are.
    def recorded(*args: Any, **kwargs: Any) -> Tensor:
        q, bounds_q, bounds_k = args[0], kwargs["cu_seqlens_q"], kwargs["cu_seqlens_k"]
        window = kwargs.get("window_size", (-1, -1))
        longest = kwargs["max_seqlen_q"], kwargs["max_seqlen_k"]
        calls.append(Call(bounds_q, bounds_k, *longest, q.dtype, window, q.requires_grad and torch.is_grad_enabled()))
        return flash_attn_varlen_func(*args, **kwargs)

    recorded.__wrapped__ = flash_attn_varlen_func  # type: ignore[attr-defined]
    padding = _module("flash_attn.bert_padding", pad_input=_not_packed, unpad_input=_not_packed)
    package = _module(
        "flash_attn",
        flash_attn_func=_not_packed,
        flash_attn_varlen_func=recorded,
        flash_attn_with_kvcache=_not_packed,
        bert_padding=padding,
    )
    found = {"general_availability_check": lambda: True, "supported_devices": ((lambda: True, "cpu"),)}
    matrix = hf_flash.FLASH_ATTENTION_COMPATIBILITY_MATRIX
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "flash_attn", package)
        patch.setitem(sys.modules, "flash_attn.bert_padding", padding)
        patch.setattr(hf_flash, "is_flash_attn_2_available", lambda *args, **kwargs: True)
        patch.setitem(matrix, 2, matrix[2] | found)
        for name in LOADED_BY_TRANSFORMERS:
            patch.setattr(hf_flash, name, None)
        for name in DERIVED_BY_TRANSFORMERS:
            patch.setattr(hf_flash, name, _no_derivation(name))
        yield calls
