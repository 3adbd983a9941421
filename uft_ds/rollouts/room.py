"""How many tokens a rank has memory to answer at once, and whether it can hold all weights meanwhile."""

from __future__ import annotations

from typing import Any

import psutil
import torch

from uft_ds.engine.engine import Engine
from uft_ds.engine.gathering import weight_bytes
from uft_ds.host.memory import memory_limit_bytes
from uft_ds.host.world import launcher_environment
from uft_ds.streams.policy import base_of

SPARE = 0.1
"""Share of the free memory that is left for activations, logits and what the allocator cannot use."""


def fits_whole(engine: Engine, *, tokens: int) -> bool:
    """Whether each rank has memory for the policy's weights beside what it holds, and for a cache of so many tokens.

    Every rank must call it, and all get the same answer.

    Args:
        tokens: that a rank answers at once, prompts and answers: `tokens_per_batch`, or those of the longest row.
    """
    policy: Any = engine.module.policy
    base = base_of(policy)
    needed = weight_bytes(policy) + tokens * cache_bytes_per_token(base.config, next(base.parameters()).dtype)
    lacks = needed > (1 - SPARE) * free_bytes(engine.device)
    return engine.agree(int(lacks)) == 0


def tokens_that_fit(engine: Engine, most: int) -> int:
    """`most` tokens, or the largest half, quarter ... of it for whose cache each rank has memory beside what it holds.

    Every rank must call it, and all get the same answer. In coarse steps, because a restart should find the same one:
    the last bits of log-probs depend on the shape of a batch.
    """
    base = base_of(engine.module.policy)
    of_token = cache_bytes_per_token(base.config, next(base.parameters()).dtype)
    room = int((1 - SPARE) * free_bytes(engine.device)) // of_token
    tokens = most
    while tokens > max(1, room):
        tokens //= 2
    return -engine.agree(-tokens)  # the smallest of all ranks


def cache_bytes_per_token(config: Any, dtype: torch.dtype) -> int:
    """Memory of one token's keys and values in all layers; where layers have a sliding window, it is less in the end.

    Args:
        config: of the base.
    """
    text = config.get_text_config()
    heads = text.num_attention_heads
    key_value_heads = getattr(text, "num_key_value_heads", None) or heads
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    return int(text.num_hidden_layers * 2 * key_value_heads * size * dtype.itemsize)


def free_bytes(device: torch.device) -> int:
    """Memory that this rank can still take: of its GPU, or its part of the host's."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    ranks = launcher_environment().ranks_per_node or torch.distributed.get_world_size()
    return min(int(psutil.virtual_memory().available), memory_limit_bytes()) // ranks
