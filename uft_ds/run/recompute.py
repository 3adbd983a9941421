"""What a run computes again in the backward pass, where the recipe leaves that to the memory at hand."""

from __future__ import annotations

from dataclasses import replace

import psutil
import torch

from uft_ds.engine.ranks import current_ranks
from uft_ds.host.world import launcher_environment
from uft_ds.planning.here import Chosen, Place, chosen_recompute
from uft_ds.recipe.settings import Settings
from uft_ds.record.report import Speaker


def with_chosen_recompute(settings: Settings, reporter: Speaker) -> Settings:
    """The settings with the mode that `model.gradient_checkpointing: auto` takes, the same on all ranks.

    Rank 0 decides, by the least memory of any rank: a mode that differs between ranks would deadlock ZeRO-3. Every rank
    must call it.

    Raises:
        UserError: the model's config is not available.
    """
    if settings.model.gradient_checkpointing != "auto":
        return settings
    memories: list[int] = [0] * current_ranks().world_size
    torch.distributed.all_gather_object(memories, _memory_bytes())
    chosen: list[Chosen | None] = [None]
    if current_ranks().is_first:
        per_node = launcher_environment().ranks_per_node or len(memories)
        place = Place(len(memories) // per_node, per_node, torch.cuda.is_available(), min(memories))
        chosen = [chosen_recompute(settings, place)]
    torch.distributed.broadcast_object_list(chosen, src=0)
    assert chosen[0] is not None
    reporter.say(chosen[0].reason)
    return replace(settings, model=replace(settings.model, gradient_checkpointing=chosen[0].mode))


def _memory_bytes() -> int:
    """Of this rank's GPU; without one, what is free on this machine."""
    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    return int(psutil.virtual_memory().available)
