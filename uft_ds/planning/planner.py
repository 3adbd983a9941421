"""Plan one setting (a workload, a DeepSpeed file, a cluster): memory, traffic, operations and time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from uft_ds.objectives.reference import HowReference
from uft_ds.planning import parts
from uft_ds.planning.activations import Activations, activations_of
from uft_ds.planning.compute import Flops, Time, least_time, step_flops
from uft_ds.planning.gathers import Gathers, forward_gathers
from uft_ds.planning.hardware import Cluster, in_gb
from uft_ds.planning.loading import loading_problems
from uft_ds.planning.memory import GpuMemory, HostMemory, gpu_memory, host_memory
from uft_ds.planning.sharding import Sharding
from uft_ds.planning.structure import Structure, structure_of
from uft_ds.planning.traffic import Traffic, traffic
from uft_ds.planning.workload import Workload
from uft_ds.streams.divided import why_not_in_groups

MODES: tuple[HowReference, ...] = ("lockstep", "separate", "cached")
"""Ways to get the reference: in lockstep with the policy, in a separate forward, or from the cache."""


@dataclass(frozen=True)
class Setting:
    """The input of one plan."""

    workload: Workload
    deepspeed: str
    """A name of `ds_configs/`, or a path."""
    sharding: Sharding
    cluster: Cluster


@dataclass(frozen=True)
class Moved:
    """Traffic, operations and time of a step, for one way to get the reference."""

    traffic: Traffic
    flops: Flops
    time: Time


@dataclass(frozen=True)
class Outcome:
    """The result of planning one setting."""

    setting: Setting
    gpu: GpuMemory
    host: HostMemory
    by_mode: dict[HowReference, Moved]
    mode: HowReference
    """The recipe's own mode in its first epoch; `cached` if no reference is needed."""
    problems: tuple[str, ...]
    """Reasons other than a step's memory why the setting cannot run, or cannot be planned."""

    @property
    def gpu_spare_bytes(self) -> int:
        """Free memory of a GPU; negative: the amount that is lacking."""
        return self.setting.cluster.gpu_memory_bytes - self.gpu.total_bytes

    @property
    def host_spare_bytes(self) -> int | None:
        """Free host memory of a node; None if its size was not given."""
        limit = self.setting.cluster.host_memory_bytes
        return None if limit is None else limit - self.host.total_bytes

    @property
    def fits(self) -> bool:
        host = self.host_spare_bytes
        return not self.problems and self.gpu_spare_bytes >= 0 and (host is None or host >= 0)

    @property
    def lacking(self) -> list[str]:
        """Which memory is too small, and the amount that is lacking."""
        host = self.host_spare_bytes or 0
        gpu = [f"a GPU lacks {in_gb(-self.gpu_spare_bytes)} GB"] if self.gpu_spare_bytes < 0 else []
        return gpu + ([f"a node's host memory lacks {in_gb(-host)} GB"] if host < 0 else [])

    @property
    def bound_seconds(self) -> float:
        """Least time of a step in the recipe's own mode."""
        return self.by_mode[self.mode].time.bound_seconds


class Planner:
    """Plans settings of one model; results that several settings share are computed once."""

    def __init__(self, config: Any) -> None:
        self._config = config
        self._structures: dict[Any, Structure] = {}
        self._activations: dict[Any, Activations] = {}
        self._gathers: dict[Any, Gathers] = {}

    def structure(self, workload: Workload) -> Structure:
        """The structure of the model with adapters."""
        key = _form(workload)
        if key not in self._structures:
            self._structures[key] = structure_of(self._config, workload.lora, workload.quantization)
        return self._structures[key]

    def activations(self, setting: Setting) -> Activations:
        """Activation memory of the largest micro-batch, of one rank."""
        workload = setting.workload
        options: dict[str, Any] = {
            "lengths": workload.lengths_at_once,
            "dtype": workload.dtype,
            "gradient_checkpointing": workload.gradient_checkpointing,
            "lockstep": workload.reference == "lockstep",
            "attention": workload.attention,
            "under_zero3": setting.sharding.shards_weights,
        }
        key = (_form(workload), *options.values())
        if key not in self._activations:
            self._activations[key] = activations_of(self.structure(workload), **options)
        return self._activations[key].divided(workload.sequence_size)

    def gathers(self, setting: Setting, mode: HowReference) -> Gathers | None:
        """Gathers of a micro-step under ZeRO-3; None below stage 3."""
        workload, sharding = setting.workload, setting.sharding
        if not sharding.shards_weights:
            return None
        passes = 2 if mode == "separate" else 1
        key = (_form(workload), workload.dtype, sharding.bounds, passes, workload.begins_with_forward)
        if key not in self._gathers:
            structure = self.structure(workload)
            self._gathers[key] = parts.micro_step_gathers(
                structure,
                structure.item_bytes(workload.dtype),
                sharding,
                passes=passes,
                begins_with_forward=workload.begins_with_forward,
            )
        return self._gathers[key]

    def step_gathers(self, setting: Setting, mode: HowReference) -> Gathers | None:
        """Gathers of a micro-step, plus those of the additional forward for a reward shift."""
        gathers, streams = self.gathers(setting, mode), setting.workload.extra_streams(mode)
        if gathers is None or streams == 0:
            return gathers
        workload, bounds = setting.workload, setting.sharding.bounds
        apart = "separate" in (mode, workload.reference if mode == "cached" else mode)
        passes = 2 if streams == 2 and apart else 1
        key = ("forward", _form(workload), workload.dtype, bounds, passes)
        if key not in self._gathers:
            structure = self.structure(workload)
            self._gathers[key] = forward_gathers(
                structure.gathered_sizes,
                parts.gathered_item_bytes(structure, structure.item_bytes(workload.dtype)),
                structure.forward(passes=passes),
                bounds,
            )
        ahead = self._gathers[key]
        times = tuple(map(sum, zip(gathers.times, ahead.times, strict=True)))
        return Gathers(times, max(gathers.peak_bytes, ahead.peak_bytes))

    def plan(self, setting: Setting) -> Outcome:
        """Plan one setting: memory, traffic, operations and time."""
        workload, sharding, cluster = setting.workload, setting.sharding, setting.cluster
        structure, activations = self.structure(workload), self.activations(setting)
        own: HowReference = "cached" if workload.reference == "none" else workload.reference
        by_mode = {}
        for mode in _modes(workload):
            moved = traffic(structure, workload, sharding, cluster, self.step_gathers(setting, mode), activations)
            streams: dict[str, Any] = {
                "with_reference": mode != "cached",
                "extra_streams": workload.extra_streams(mode),
            }
            flops = step_flops(structure, workload, cluster.ranks, **streams)
            time = least_time(structure, workload, sharding, cluster, flops, moved, **streams)
            by_mode[mode] = Moved(moved, flops, time)
        return Outcome(
            setting=setting,
            gpu=gpu_memory(structure, workload, sharding, cluster, activations, self.step_gathers(setting, own)),
            host=host_memory(structure, workload, sharding, cluster, activations),
            by_mode=by_mode,
            mode=own,
            problems=(*_problems(setting), *loading_problems(structure, workload, sharding, cluster)),
        )


def _form(workload: Workload) -> tuple[str, str | None]:
    """What decides the structure of a model; adapters are not hashable, as their targets may be a list."""
    return repr(workload.lora), workload.quantization


def _modes(workload: Workload) -> tuple[HowReference, ...]:
    if workload.reference == "none":
        return ("cached",)
    return ("separate", "cached") if workload.lora.copies_base else MODES


def _problems(setting: Setting) -> Iterable[str]:
    workload, sharding, cluster = setting.workload, setting.sharding, setting.cluster
    if sharding.stage < 3 and workload.lora.dtype != workload.dtype:
        yield (
            f"{setting.deepspeed}: at ZeRO stage {sharding.stage} adapters are trained in the model's type: "
            f"lora.dtype={workload.dtype}"
        )
    in_groups = why_not_in_groups(cluster.ranks, workload.sequence_size)
    if in_groups is not None:
        yield in_groups
    if cluster.gpus % sharding.secondary:  # as `check_ranks` refuses it at the start
        yield (
            f"{setting.deepspeed}: zero_hpz_partition_size {sharding.secondary} does not divide a node's "
            f"{cluster.gpus} GPUs: copy the file with zero_hpz_partition_size {cluster.gpus}, and give the copy's path"
        )
    if sharding.weights_on == "nvme":
        yield f"{setting.deepspeed}: weights on NVMe are not planned"
