"""A run's memory as `uft plan` counts it, compared with the machine at hand."""

from __future__ import annotations

from dataclasses import dataclass, replace

import psutil
import torch

from uft_ds.engine.deepspeed_file import read_deepspeed_file
from uft_ds.host.gpus import known_gpus
from uft_ds.host.memory import memory_limit_bytes
from uft_ds.kernels.tiles import CPU
from uft_ds.planning.hardware import GB, Figures, cluster_of
from uft_ds.planning.planner import Outcome, Planner, Setting
from uft_ds.planning.recompute import SPARE, fastest_that_fits
from uft_ds.planning.shapes import model_config
from uft_ds.planning.sharding import sharding_of
from uft_ds.planning.workload import workload_of
from uft_ds.recipe.settings import Settings
from uft_ds.streams.load import attention_implementation
from uft_ds.streams.recompute import Recompute

_CPU_PROCESS_BYTES = GB
"""Python, torch and DeepSpeed of a rank without a GPU; 0.6 GB measured, the tiny model included."""


@dataclass(frozen=True)
class Place:
    """Where the ranks of a run are: machines that are alike.

    memory_bytes: of a rank's GPU; without GPUs, what the ranks of one machine share.
    """

    nodes: int
    ranks_per_node: int
    has_gpus: bool
    memory_bytes: int

    @property
    def whose(self) -> str:
        """Whose memory it is, for messages."""
        if self.has_gpus:
            return "a GPU"
        return "one rank" if self.ranks_per_node == 1 else f"{self.ranks_per_node} ranks together"


@dataclass(frozen=True)
class Chosen:
    """The mode that `auto` takes, what it needs of the place's memory, whether that is there, and all in words."""

    mode: Recompute
    needed_bytes: int
    fits: bool
    reason: str


def this_machine(ranks: int) -> Place:
    """This machine alone, with all its GPUs, which the ranks are yet to be started on."""
    if not torch.cuda.is_available():
        return Place(1, ranks, False, free_bytes())
    memory_bytes = min(torch.cuda.mem_get_info(device)[1] for device in range(torch.cuda.device_count()))
    return Place(1, ranks, True, memory_bytes)


def free_bytes() -> int:
    """Memory of this machine that is free, or the limit of the container around this process if that is less."""
    return min(int(psutil.virtual_memory().available), memory_limit_bytes())


def memory_note(settings: Settings, ranks: int) -> str:
    """A sentence on the memory of a step's peak, for `ranks` ranks on this machine, and what it has.

    Raises:
        UserError: the model's config is not available.
    """
    place = this_machine(ranks)
    outcome = _planned(settings, place)
    needed = _needed_bytes(outcome, place)
    has = "" if place.has_gpus else " that are free"
    note = (
        f"memory: at most about {needed / GB:.1f} GB for {place.whose}, of {place.memory_bytes / GB:.1f} GB{has}, as "
        f"`uft plan` counts{_unless_it_fits(needed, place)}"
    )
    return note if settings.model.gradient_checkpointing != "auto" else f"{note}\n{_in_words(outcome, place)}"


def chosen_recompute(settings: Settings, place: Place) -> Chosen:
    """What `model.gradient_checkpointing: auto` takes there; a mode that the recipe states is taken as it is.

    Raises:
        UserError: the model's config is not available.
    """
    outcome = _planned(settings, place)
    needed = _needed_bytes(outcome, place)
    mode = outcome.setting.workload.gradient_checkpointing
    return Chosen(mode, needed, needed <= place.memory_bytes, _in_words(outcome, place))


def _planned(settings: Settings, place: Place) -> Outcome:
    config, _ = model_config(settings.model.base, settings.model.revision)
    cluster = cluster_of(
        nodes=place.nodes,
        gpus=place.ranks_per_node,
        gpu=next(iter(known_gpus())),
        figures=Figures(network_gbits=400),
    )
    name = settings.deepspeed.name
    workload = workload_of(settings, config, tokens_per_response=None)
    # By what is installed here, where a plan for other GPUs assumes flash-attention.
    dtype = getattr(torch, settings.model.dtype)
    workload = replace(workload, attention=attention_implementation(settings.model.attention, dtype, config))
    if not place.has_gpus:
        workload = replace(workload, logits_bytes=workload.logits_bytes or CPU.chunk_bytes)
    planner = Planner(config)
    setting = Setting(workload, name, sharding_of(read_deepspeed_file(name)), cluster)
    if settings.model.gradient_checkpointing == "auto":
        setting = fastest_that_fits(
            planner, setting, lambda outcome: _needed_bytes(outcome, place) * SPARE <= place.memory_bytes
        )
    return planner.plan(setting)


def _needed_bytes(outcome: Outcome, place: Place) -> int:
    """What the ranks need of the place's memory."""
    if place.has_gpus:
        return outcome.gpu.total_bytes
    # Everything is in host memory here; the reserve is that of CUDA.
    held = replace(outcome.gpu, reserve_bytes=0).total_bytes + _CPU_PROCESS_BYTES
    return place.ranks_per_node * held + outcome.host.total_bytes - outcome.host.processes_bytes


def _in_words(outcome: Outcome, place: Place) -> str:
    mode = outcome.setting.workload.gradient_checkpointing
    needed = _needed_bytes(outcome, place)
    verb = "needs" if place.has_gpus or place.ranks_per_node == 1 else "need"
    return (
        f"model.gradient_checkpointing: auto takes {str(mode).lower()}, with which {place.whose} {verb} about "
        f"{needed / GB:.1f} of {place.memory_bytes / GB:.1f} GB{_unless_it_fits(needed, place)}"
    )


def _unless_it_fits(needed_bytes: int, place: Place) -> str:
    return "" if needed_bytes <= place.memory_bytes else "; it does not fit: `uft plan` says what to change"
