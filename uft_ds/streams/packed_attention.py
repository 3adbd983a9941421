"""Attention of packed rows, in which each sequence attends to itself alone: no mask, and no work on other sequences.

Where sequences share a prompt, it is in the row once: what follows it in one of them is a segment of its own, whose
tokens attend to the prompt's keys and then to their own.

With sdpa or eager attention, transformers builds a mask of [tokens x tokens] for a packed row and computes the whole
square, most of which the mask then hides. Here

* a GPU since Ampere in half precision runs torch's own varlen attention, which is FlashAttention inside of torch
  (2.13 and newer);
* anything else runs transformers' attention for one sequence after the other, exactly as if each were alone; sdpa with
  a mask of [own tokens x tokens with the prompt] for what follows a shared prompt.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from uft_ds.streams.divided import PACKED, SequenceGroup

_AMPERE = (8, 0)
"""The oldest compute capability that FlashAttention runs on."""


@dataclass(frozen=True)
class Segments:
    """The segments of a row as the host knows them: a question to the device would wait for it in each layer.

    lengths, prompt_of: as in `data.micro_batch.MicroBatch`.
    among: the ranks that the row's tokens are divided over; None: this rank has all of them.
    """

    lengths: tuple[int, ...]
    prompt_of: tuple[int | None, ...]
    among: SequenceGroup | None = None

    @property
    def key_lengths(self) -> tuple[int, ...]:
        """How many keys each segment's last token attends to."""
        return tuple(
            own + (0 if prompt is None else self.lengths[prompt])
            for own, prompt in zip(self.lengths, self.prompt_of, strict=True)
        )

    @property
    def share_prompts(self) -> bool:
        return any(prompt is not None for prompt in self.prompt_of)


def bounds_for_attention(
    bounds_S: Tensor,
    lengths: Seq[int],
    prompt_of: Seq[int | None] | None = None,
    among: SequenceGroup | None = None,
) -> dict[str, Any]:
    """The arguments of a decoder that tell the attention where segments begin and end, and what they attend to.

    Args:
        bounds_S: [segments + 1], int32, cumulative lengths in tokens, on the device.
        lengths, prompt_of: as in `data.micro_batch.MicroBatch`; without `prompt_of` all are whole sequences.
        among: as in `Segments`.
    """
    segments = Segments(tuple(lengths), tuple(prompt_of) if prompt_of is not None else (None,) * len(lengths), among)
    key_bounds_S = bounds_S
    if segments.share_prompts:
        # Made on the host and copied, which does not wait for what the device has still to do.
        on_host_S = torch.tensor([0, *accumulate(segments.key_lengths)], dtype=torch.int32)
        key_bounds_S = on_host_S.to(bounds_S.device, non_blocking=True)
    return {"cu_seq_lens_q": bounds_S, "cu_seq_lens_k": key_bounds_S, "segments": segments}


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor,
    cu_seq_lens_k: Tensor,
    segments: Segments,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention with transformers' interface.

    Args:
        query: [1, heads, tokens, head size]; key, value: with fewer heads where groups share them. The tokens are this
            rank's, if the row is divided over several.
        attention_mask: None; the segments' bounds say all that a mask would.
        cu_seq_lens_q, cu_seq_lens_k, segments: as made by `bounds_for_attention`.
        options: scaling, of the scores; sliding_window, the number of tokens, its own included, that a token attends
            to; softcap, the bound of the scores before the softmax (Gemma 2).
    Returns:
        [1, tokens, heads, head size], and None for the weights.
    Raises:
        ValueError: the model asks for something that this attention does not do.
    """
    asked = [name for name in ("s_aux", "position_bias", "head_mask") if options.get(name) is not None]
    is_causal = options.get("is_causal", getattr(module, "is_causal", True))
    if attention_mask is not None or is_causal is False or asked:
        raise ValueError(f"packed attention has no {', '.join(asked) or 'mask of a model, and is causal'}")
    among = segments.among
    if among is not None:
        query, key, value = (among.own_heads(part) for part in (query, key, value))
    output = _attended(module, query, key, value, (cu_seq_lens_q, cu_seq_lens_k), segments, options)
    return (output if among is None else among.own_tokens(output)), None


def _attended(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: tuple[Tensor, Tensor],
    segments: Segments,
    options: Mapping[str, Any],
) -> Tensor:
    """Attention of a whole row: [1, tokens, heads, head size]."""
    scaling, window, softcap = (options.get(name) for name in ("scaling", "sliding_window", "softcap"))
    if softcap is None and _runs_varlen(query):
        if segments.share_prompts:
            key, value = (torch.cat(_of_segments(tensor, segments), dim=2) for tensor in (key, value))
        longest = max(segments.lengths), max(segments.key_lengths)
        return _varlen(query, key, value, bounds, longest, scaling, window)
    outputs = [
        _alone(module, *part, scaling=scaling, window=window, softcap=softcap)
        for part in zip(
            query.split(segments.lengths, dim=2),
            _of_segments(key, segments),
            _of_segments(value, segments),
            strict=True,
        )
    ]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def _of_segments(row: Tensor, segments: Segments) -> list[Tensor]:
    """The keys or values that each segment attends to: [1, heads, tokens, head size] each."""
    # One split, whose backward joins the gradients; a slice's backward would fill the whole row with zeros each time.
    parts = row.split(segments.lengths, dim=2)
    return [
        own if prompt is None else torch.cat([parts[prompt], own], dim=2)
        for own, prompt in zip(parts, segments.prompt_of, strict=True)
    ]


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
    """Attention of one segment, whose queries are the last of its keys: [1, tokens, heads, head size]."""
    length = key.shape[2]
    window = window if window is not None and length > window else None
    follows_prompt = query.shape[2] < length
    if softcap is None and (window is not None or follows_prompt):
        # Not by transformers' function, which would copy each key and value for all heads of its group.
        mask = _causal(query.shape[2], length, window, query.device)
        masked = nn.functional.scaled_dot_product_attention(
            query, key, value, mask, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
        )
        return masked.transpose(1, 2).contiguous()
    if softcap is None:
        output, _ = sdpa_attention_forward(module, query, key, value, None, scaling=scaling, is_causal=True)
        return output
    mask = _causal(query.shape[2], length, window, query.device)
    hidden = torch.where(mask, 0.0, torch.finfo(query.dtype).min).to(query.dtype)
    eager: Any = sys.modules[type(module).__module__].eager_attention_forward
    capped: Tensor = eager(module, query, key, value, hidden, scaling=scaling, softcap=softcap)[0]
    return capped


def _causal(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """[1, 1, queries, keys], bool: which keys each query attends to; the queries are the last of the keys."""
    places = torch.arange(keys, device=device)
    distance = places[keys - queries :, None] - places[None, :]
    seen = distance >= 0
    if window is not None:
        seen &= distance < window
    return seen[None, None]


def _runs_varlen(query: Tensor) -> bool:
    """On GPUs, in half precision; torch 2.12 and older have another signature, without groups of heads.

    sdpa has other kernels for older GPUs, and pads other head sizes; this function has FlashAttention as it is.
    """
    is_new = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)
    if not (is_new and query.is_cuda and query.dtype != torch.float32):
        return False
    head = query.shape[-1]
    return head % 8 == 0 and head <= 256 and torch.cuda.get_device_capability(query.device) >= _AMPERE


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: tuple[Tensor, Tensor],
    longest: tuple[int, int],
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """torch's attention of all segments at once; bounds, longest: of queries, and of keys.

    A segment's last query sees all of its keys, as in FlashAttention 2.1 and newer.
    """
    from torch.nn.attention.varlen import varlen_attn

    query_THd, key_THd, value_THd = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
    output = varlen_attn(
        query_THd,
        key_THd,
        value_THd,
        *bounds,
        *longest,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(output, Tensor)
    return output.unsqueeze(0)


@contextmanager
def attention_of_transformers(model: Any) -> Iterator[None]:
    """Within the block, a model with packed attention computes by transformers' own: for text that is not packed."""
    config = model.get_decoder().config  # the model's own, or of a wrapper's language model
    before = config._attn_implementation
    if before == PACKED:
        config._attn_implementation = "sdpa" if model._supports_sdpa else "eager"
    try:
        yield
    finally:
        config._attn_implementation = before


AttentionInterface.register(PACKED, packed_attention)
# Not in `AttentionMaskInterface`: for an attention that is not there transformers makes no mask. For one that is, it
# asks the device in each forward whether the row is packed, and waits for it (5.23, `find_packed_sequence_indices`).
