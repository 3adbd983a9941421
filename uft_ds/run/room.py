"""Whether this machine has room for a run's ranks: memory, by a lower bound, and cores."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch

from uft_ds.engine.zero_section import parsed_zero_section
from uft_ds.errors import UserError
from uft_ds.host.memory import memory_limit_bytes
from uft_ds.recipe.settings import Settings
from uft_ds.streams.load import check_base, check_base_files, meta_model

PROCESS_BYTES = 80_000_000
"""Private memory of a rank that trains a model of no size: 87 MB with torch 2.13 and transformers 5.23, without a GPU.

A forked rank shares what the command has imported. One that torchrun starts has 293 MB before it loads anything.
"""
_GB = 10**9


def check_room(settings: Settings, *, ranks: int, has_gpu: bool) -> None:
    """Refuse ranks that need more memory than this machine has, whatever data they train on.

    The need is a lower bound: each process, and the base's weights where they lie in host memory. Activations,
    optimiser and gathered layers come on top.

    Args:
        settings: with the content of the DeepSpeed file.
    Raises:
        UserError: names what needs how much, how much there is, and what to do.
    """
    copies, weights = _copies_in_host_memory(settings, ranks, has_gpu), 0
    if copies:
        model = meta_model(check_base(settings.model.base, settings.model.revision))
        weights = sum(p.numel() for p in model.parameters()) * getattr(torch, settings.model.dtype).itemsize
    need, limit = ranks * PROCESS_BYTES + copies * weights, memory_limit_bytes()
    if need <= limit:
        return
    parts = [f"{ranks * PROCESS_BYTES / _GB:.1f} GB for the processes"]
    if copies:
        what = "the weights" if copies == 1 else f"{copies} copies of the weights"
        parts.append(f"{copies * weights / _GB:.1f} GB for {what} in {settings.model.dtype}")
    remedies = [f"set launch.ranks below {ranks}"] if ranks > 1 else []
    if copies > 1 and not _is_sharded(settings):
        remedies.append("shard the base over the ranks with deepspeed=zero3_cpu")
    remedies += ["give it more memory (swap counts)", "take a smaller base"]
    raise UserError(
        f"launch.ranks: {ranks} ranks need at least {need / _GB:.1f} GB of host memory ({', '.join(parts)}), and this "
        f"machine or its container has {limit / _GB:.1f} GB; {', or '.join(remedies)}"
    )


def _copies_in_host_memory(settings: Settings, ranks: int, has_gpu: bool) -> int:
    """How many times the base's weights take host memory, over all ranks of this machine: the reference's copy too."""
    zero = parsed_zero_section(settings.deepspeed.checked["zero_optimization"])
    if _is_sharded(settings):
        device = None if zero.offload_param is None else zero.offload_param.device
        return int(not has_gpu or device == "cpu") + settings.copies_reference
    if has_gpu:
        return 0
    return ranks * (1 + settings.copies_reference) if _is_converted(settings) else 1


def _is_sharded(settings: Settings) -> bool:
    return int(parsed_zero_section(settings.deepspeed.checked["zero_optimization"]).stage) == 3


def _is_converted(settings: Settings) -> bool:
    """Whether each rank converts the weights on loading. If not, the ranks share the pages of the weight files."""
    folder = Path(settings.model.base)
    if not folder.is_dir():
        return False  # of the hub, and perhaps not yet here
    try:
        _, stored = check_base_files(folder)
    except UserError:  # the check of the base tells it in full
        return False
    return all(tensor.dtype != getattr(torch, settings.model.dtype) for tensor in stored.values())


def core_notes(*, ranks: int) -> Iterator[str]:
    """A note on ranks that have to share a core."""
    cores = len(os.sched_getaffinity(0))
    if ranks > cores:
        yield (
            f"note: launch.ranks: {ranks} ranks share {cores} core{'s' * (cores > 1)} and take turns: more ranks than "
            "cores make no step faster"
        )
