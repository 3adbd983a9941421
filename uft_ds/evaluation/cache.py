"""The cache of keys and values through which a prompt is read once for many answers."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from uft_ds.architectures.facts import most_positions, wraps_a_language_model

ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 0.15, torch.float16: 0.02}
"""The largest typical difference of a log-prob between a forward with a cache and one without, nats. Measured on tiny
models of 24 families: 6e-7 in float32, 0.006 in bfloat16; without the cache's prompt 0.25 to 4."""
_CHECKED_TOKENS = 64


class RoomyLayer(DynamicLayer):
    """Keys and values of one layer, with room for the tokens to come.

    transformers' own layer copies all keys and values for each new token.
    """

    def __init__(self, room: int) -> None:
        """
        Args:
            room: tokens that the layer has memory for from the start; it grows beyond.
        """
        super().__init__()
        self._room = room
        self._buffers: list[Tensor | None] = [None, None]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values, [batch, heads, tokens, head size] each; all of them so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._appended(0, self.keys, key_states)
        self.values = self._appended(1, self.values, value_states)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Go on with these rows. The memory of all others is free at once, before the next layer is treated."""
        super().batch_select_indices(indices)
        self._buffers = [None, None]

    def _appended(self, place: int, held: Tensor | None, new: Tensor) -> Tensor:
        assert held is not None, "initialized"
        count = held.shape[-2] if held.numel() else 0
        total = count + new.shape[-2]
        buffer = self._buffers[place]
        # After another operation of the cache, `held` is no longer the beginning of the buffer.
        if buffer is None or held.data_ptr() != buffer.data_ptr() or total > buffer.shape[-2]:
            batch, heads, _, size = new.shape
            buffer = new.new_empty(batch, heads, max(total, self._room), size)
            if count:
                buffer[:, :, :count] = held
            self._buffers[place] = buffer
        buffer[:, :, count:total] = new
        return buffer[:, :, :total]


def new_cache(model: Any, room: int) -> DynamicCache:
    """An empty cache for a model, with the layers that its config asks for.

    Args:
        room: tokens of a row that will be held.
    """
    cache = DynamicCache(config=model.config)
    cache.layers = [RoomyLayer(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


@torch.no_grad()
def cache_is_exact(model: Any, prompt: list[int], device: torch.device) -> bool:
    """Whether answers may continue one prompt's cache: structure, and a comparison with forwards without a cache.

    The cache must hold nothing but keys and values of attention, whose rows can be taken several times. Two different
    answers then continue the cache of one prompt, and their log-probs are compared with those of two whole rows. Under
    ZeRO-3 every rank must call it with the same prompt.

    Args:
        prompt: token ids, at least one.
    """
    if wraps_a_language_model(model.config):
        # A model of images and text keeps more than a cache between two calls: Qwen2.5-VL a shift of positions a row,
        # which does not follow rows that are taken out (transformers 5.23).
        return False
    cache = new_cache(model, room=0)
    layers: list[Any] = cache.layers
    kinds = {type(layer) for layer in layers}
    takes_cache = "past_key_values" in inspect.signature(model.forward).parameters
    if not takes_cache or not kinds or not kinds <= {RoomyLayer, DynamicSlidingWindowLayer}:
        return False
    positions = most_positions(model.config)
    count = _CHECKED_TOKENS if positions is None else min(_CHECKED_TOKENS, positions - 2)  # and an answer of 2 tokens
    if count < 2:
        return False
    tokens = (prompt * count)[:count]
    answers = torch.tensor([tokens[:2], tokens[-2:]], device=device)
    prompt_BT = torch.tensor([tokens], device=device)
    model(input_ids=prompt_BT, past_key_values=cache, use_cache=True)
    if any(layer.keys is None or layer.get_seq_length() != len(tokens) for layer in layers):
        return False
    cache.batch_select_indices(torch.tensor([0, 0], device=device))
    through_cache = model(input_ids=answers, past_key_values=cache, use_cache=True).logits
    whole = model(input_ids=torch.cat([prompt_BT.expand(2, -1), answers], dim=1), use_cache=False).logits
    return are_alike(through_cache[:, -1], whole[:, -1], next(model.parameters()).dtype)


def are_alike(continued: Tensor, whole: Tensor, dtype: torch.dtype) -> bool:
    """Whether logits through a cache and those of whole rows, [..., vocabulary], are the same but for rounding.

    Args:
        dtype: of the model.
    """
    differences = continued.float().log_softmax(-1) - whole.float().log_softmax(-1)
    return float(differences.double().square().mean().sqrt()) <= ALLOWED[dtype]  # not where it is NaN
