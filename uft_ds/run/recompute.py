"""What a run computes again in the backward pass, where the recipe leaves that to the memory at hand."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch

from uft_ds.engine.ranks import current_ranks
from uft_ds.errors import UserError
from uft_ds.host.world import launcher_environment
from uft_ds.planning.here import Chosen, Place, chosen_recompute, free_bytes
from uft_ds.recipe.settings import Settings
from uft_ds.record.report import Speaker

logger = logging.getLogger("uft_ds")


def with_chosen_recompute(settings: Settings, reporter: Speaker) -> Settings:
    """The settings with the mode that `model.gradient_checkpointing: auto` takes, the same on all ranks.

    Rank 0 decides, by the least memory of any rank: a mode that differs between ranks would deadlock ZeRO-3. Every rank
    must call it.

    Raises:
        UserError: the model's config is not available; on all ranks.
    """
    if settings.model.gradient_checkpointing != "auto":
        return settings
    memories: list[int] = [0] * current_ranks().world_size
    torch.distributed.all_gather_object(memories, _memory_bytes())
    # An error travels, too: the others would wait for the broadcast until it times out.
    chosen: list[Chosen | str] = [""]
    if current_ranks().is_first:
        per_node = launcher_environment().ranks_per_node or len(memories)
        place = Place(-(-len(memories) // per_node), per_node, torch.cuda.is_available(), min(memories))
        chosen = [_chosen(settings, place)]
    torch.distributed.broadcast_object_list(chosen, src=0)
    found = chosen[0]
    if isinstance(found, str):
        raise UserError(found)
    (reporter.say if found.fits else reporter.warn)(found.reason)
    return replace(settings, model=replace(settings.model, gradient_checkpointing=found.mode))


def _chosen(settings: Settings, place: Place) -> Chosen | str:
    """The mode, or what is wrong with the recipe."""
    try:
        with torch.random.fork_rng(devices=[]):  # a plan draws numbers, on this rank alone
            return chosen_recompute(settings, place)
    except UserError as error:
        return str(error)
    except Exception as error:
        logger.exception("a model that cannot be planned")
        reason = f"model.gradient_checkpointing: auto takes true, because this model cannot be planned ({error})"
        return Chosen(True, 0, False, reason)


def _memory_bytes() -> int:
    """Of this rank's GPU, whatever else uses it; without one, what is free on this machine."""
    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    return free_bytes()
