"""What a cache takes, and when all weights fit beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import GPT2, PACKED, tiny_model
from one_process import OneProcess
from transformers import DynamicCache

from uft_ds.rollouts import room
from uft_ds.rollouts.room import cache_bytes_per_token, fits_whole, free_bytes
from uft_ds.streams.load import model_of


@pytest.mark.parametrize("name", [*PACKED, "gpt2"])
@torch.no_grad()
def test_a_token_takes_what_the_cache_grows_by(name: str) -> None:
    """Of each family, in bytes of the keys and values that a forward of seven tokens leaves."""
    config = (PACKED | {"gpt2": GPT2})[name]
    model = model_of(config).to(torch.float32)
    cache = DynamicCache(config=config)
    model(torch.tensor([[5, 6, 7, 8, 9, 10, 11]]), past_key_values=cache, use_cache=True)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert 7 * cache_bytes_per_token(config, torch.float32) == held
    assert cache_bytes_per_token(config, torch.bfloat16) == cache_bytes_per_token(config, torch.float32) // 2


def test_a_tenth_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """All weights and the cache may take nine tenths of what is free."""
    engine: Any = OneProcess(tiny_model(PACKED["llama"]))
    weights = sum(parameter.numel() * 4 for parameter in engine.module.parameters())
    needed = weights + 100 * cache_bytes_per_token(PACKED["llama"], torch.float32)
    monkeypatch.setattr(room, "free_bytes", lambda device: needed / 0.9 + 1)
    assert fits_whole(engine, tokens=100)
    assert not fits_whole(engine, tokens=101)


def test_one_rank_that_lacks_memory_decides_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks agree by the largest of 1, for a rank that lacks it, and 0."""
    engine: Any = OneProcess(tiny_model(PACKED["llama"]))
    monkeypatch.setattr(room, "free_bytes", lambda device: 10**12)
    assert fits_whole(engine, tokens=1)
    engine.agree = lambda value: max(value, 1)
    assert not fits_whole(engine, tokens=1)


def test_ranks_of_a_host_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as the launcher says that there are."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    alone = free_bytes(torch.device("cpu"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert alone / 4.4 < free_bytes(torch.device("cpu")) < alone / 3.6
