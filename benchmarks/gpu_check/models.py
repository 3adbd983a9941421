"""Random models of real families, and the rows that stages forward."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import torch
import transformers as hf

from uft_ds.data.example import Response, Sequence
from uft_ds.streams.adapters import add_adapters
from uft_ds.streams.recompute import Recompute, enable_recompute

VOCABULARY = 4096


def sizes(*, toy: bool) -> dict[str, Any]:
    """Of a config: heads of 64 as FlashAttention wants them, two query heads to a key; small enough for float32."""
    hidden = 64 if toy else 512
    return {
        "hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": 2 if toy else 4,
        "num_attention_heads": 4 if toy else 8, "num_key_value_heads": 2 if toy else 4, "vocab_size": VOCABULARY,
        "max_position_embeddings": 4096, "initializer_range": 0.1 if toy else 0.04,
    }  # fmt: skip


def families(*, toy: bool) -> dict[str, Any]:
    """Grouped queries in all; a window in two; capped scores, and norms of queries and keys, in one each."""
    common = sizes(toy=toy)
    head, window = common["hidden_size"] // common["num_attention_heads"], 8 if toy else 128
    own_head = {"head_dim": head, "query_pre_attn_scalar": head}
    return {
        "llama": hf.LlamaConfig(**common),
        "mistral, window": hf.MistralConfig(**common, sliding_window=window),
        "qwen3": hf.Qwen3Config(**common, head_dim=head),
        "gemma2, capped": hf.Gemma2Config(**common, **own_head, sliding_window=window, attn_logit_softcapping=2.0),
        "gemma3, window": hf.Gemma3TextConfig(
            **common, **own_head, sliding_window=window,
            layer_types=["sliding_attention", "full_attention"] * (common["num_hidden_layers"] // 2),
        ),
    }  # fmt: skip


def random_policy(
    config: Any,
    device: torch.device,
    *,
    dtype: torch.dtype,
    attention: str,
    recompute: Recompute = False,
    lora_rank: int = 16,
    b_std: float = 0.0,
    sharded: Callable[[Any], None] = lambda base: None,
) -> Any:
    """A random base on the device with fresh adapters on all linear layers, in float32; B is zero or drawn.

    Args:
        sharded: called with the base before it gets adapters.
    """
    torch.manual_seed(0)
    with torch.device(device):
        # A copy: the model keeps the config, and the attention in it.
        base = hf.AutoModelForCausalLM.from_config(deepcopy(config), attn_implementation=attention, dtype=dtype)
    base.requires_grad_(False)
    base.train()
    enable_recompute(base, recompute)
    sharded(base)
    policy = add_adapters(
        base, rank=lora_rank, alpha=2.0 * lora_rank, targets="all-linear", dtype=torch.float32, seed=1
    )
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(device)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name and b_std:
            torch.nn.init.normal_(parameter, std=b_std)
    return policy


def sequences(*lengths: int, vocabulary: int = VOCABULARY, seed: int = 0) -> list[Sequence]:
    """Random tokens, the last two thirds of each a scored response."""
    rng = np.random.default_rng(seed)
    return [
        Sequence(
            rng.integers(3, vocabulary, size=length).astype(np.int32),
            (Response(max(1, length // 3), length, float(rng.random()), "score", f"random:{seed}.{number}"),),
        )
        for number, length in enumerate(lengths)
    ]


def answers(prompt: int, *lengths: int, vocabulary: int = VOCABULARY) -> list[Sequence]:
    """Answers of these lengths to one prompt."""
    rng = np.random.default_rng(1)
    start = rng.integers(3, vocabulary, size=prompt)
    rows = [np.concatenate([start, rng.integers(3, vocabulary, size=length)]).astype(np.int32) for length in lengths]
    return [Sequence(row, (Response(prompt, len(row), float(rng.random()), "score", "shared"),)) for row in rows]
