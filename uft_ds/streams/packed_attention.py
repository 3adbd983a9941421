"""Attention of packed rows, in which each sequence attends to itself alone: no mask, and no work on other sequences.

With sdpa or eager attention, transformers builds a mask of [tokens x tokens] for a packed row and computes the whole
square, most of which the mask then hides. Here

* a GPU in half precision runs torch's own varlen attention, which is FlashAttention inside of torch (2.13 and newer);
* anything else runs transformers' attention for one sequence after the other, exactly as if each were alone.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import flash_attention_mask

PACKED = "packed"
"""Name of this attention in transformers, and in `model.attention`."""


def bounds_for_attention(bounds_S: Tensor, lengths: Seq[int]) -> dict[str, Any]:
    """The arguments of a decoder that tell the attention where sequences begin and end.

    Args:
        bounds_S: [sequences + 1], int32, cumulative lengths in tokens, on the device.
        lengths: of each sequence, known to the host: a question to the device would wait for it in each layer.
    """
    return {"cu_seq_lens_q": bounds_S, "lengths": tuple(lengths)}


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor,
    lengths: tuple[int, ...],
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention with transformers' interface.

    Args:
        query: [1, heads, tokens, head size]; key, value: with fewer heads where groups share them.
        attention_mask: None; the sequences' bounds say all that a mask would.
        options: scaling, of the scores; sliding_window, the number of tokens, its own included, that a token attends
            to; softcap, the bound of the scores before the softmax (Gemma 2).
    Returns:
        [1, tokens, heads, head size], and None for the weights.
    Raises:
        ValueError: the model asks for something that this attention does not do.
    """
    asked = [name for name in ("s_aux", "position_bias", "head_mask") if options.get(name) is not None]
    if attention_mask is not None or options.get("is_causal") is False or asked:
        raise ValueError(f"packed attention has no {', '.join(asked) or 'mask of a model, and is causal'}")
    scaling, window, softcap = (options.get(name) for name in ("scaling", "sliding_window", "softcap"))
    if softcap is None and _runs_varlen(query):
        return _varlen(query, key, value, cu_seq_lens_q, max(lengths), scaling, window), None
    # One split, whose backward joins the gradients; a slice's backward would fill the whole row with zeros each time.
    parts = (tensor.split(lengths, dim=2) for tensor in (query, key, value))
    outputs = [
        _alone(module, *part, scaling=scaling, window=window, softcap=softcap) for part in zip(*parts, strict=True)
    ]
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)), None


def _alone(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Attention of one sequence by transformers: [1, tokens, heads, head size]."""
    length = query.shape[2]
    is_windowed = window is not None and length > window
    if softcap is None and is_windowed:
        # Not by transformers' function, which would copy each key and value for all heads of its group.
        mask = _causal(length, window, query.device)
        windowed = scaled_dot_product_attention(
            query, key, value, mask, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
        )
        return windowed.transpose(1, 2).contiguous()
    if softcap is None:
        output, _ = sdpa_attention_forward(module, query, key, value, None, scaling=scaling, is_causal=True)
        return output
    mask = _causal(length, window if is_windowed else None, query.device)
    hidden = torch.where(mask, 0.0, torch.finfo(query.dtype).min).to(query.dtype)
    eager: Any = sys.modules[type(module).__module__].eager_attention_forward
    capped: Tensor = eager(module, query, key, value, hidden, scaling=scaling, softcap=softcap)[0]
    return capped


def _causal(length: int, window: int | None, device: torch.device) -> Tensor:
    """[1, 1, length, length], bool: which keys each query attends to."""
    places = torch.arange(length, device=device)
    distance = places[:, None] - places[None, :]
    seen = distance >= 0
    if window is not None:
        seen &= distance < window
    return seen[None, None]


def _runs_varlen(query: Tensor) -> bool:
    """On GPUs, in half precision; torch 2.12 and older have another signature, without groups of heads."""
    is_new = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)
    return is_new and query.is_cuda and query.dtype != torch.float32


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, bounds_S: Tensor, longest: int, scaling: float | None, window: int | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    query_THd, key_THd, value_THd = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
    output = varlen_attn(
        query_THd,
        key_THd,
        value_THd,
        bounds_S,
        bounds_S,
        longest,
        longest,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(output, Tensor)
    return output.unsqueeze(0)


@contextmanager
def attention_of_transformers(model: Any) -> Iterator[None]:
    """Within the block, a model with packed attention computes by transformers' own: for text that is not packed."""
    config = model.config
    before = config._attn_implementation
    if before == PACKED:
        config._attn_implementation = "sdpa" if model._supports_sdpa else "eager"
    try:
        yield
    finally:
        config._attn_implementation = before


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, flash_attention_mask)  # no mask where the caller gives none
