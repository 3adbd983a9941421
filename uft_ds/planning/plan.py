"""From a recipe and a cluster to a plan: what fits, what is moved, the least time, and what to change.

Nothing is allocated, launched or downloaded. Every alternative that is named has been planned like the recipe itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

from uft_ds.errors import UserError
from uft_ds.planning import parts
from uft_ds.planning.activations import Activations, activations_of
from uft_ds.planning.compute import Flops, Time, least_time, mfu_flops, step_flops
from uft_ds.planning.gathers import Gathers
from uft_ds.planning.hardware import Cluster
from uft_ds.planning.memory import Disk, GpuMemory, HostMemory, disk, gpu_memory, host_memory
from uft_ds.planning.sharding import Sharding, sharding_of
from uft_ds.planning.shapes import model_config
from uft_ds.planning.structure import Lora, Structure, structure_of
from uft_ds.planning.traffic import Traffic, traffic
from uft_ds.planning.workload import Workload, workload_of
from uft_ds.recipe import Recipe
from uft_ds.training.engine import deepspeed_files, read_deepspeed_file

Modes = ("lockstep", "separate", "cached")
"""Ways to have the reference: beside the policy, in a forward of its own, read from the cache."""


@dataclass(frozen=True)
class Setting:
    """What one plan is of."""

    workload: Workload
    deepspeed: str
    """A name of `ds_configs/`, or a path."""
    sharding: Sharding
    cluster: Cluster


@dataclass(frozen=True)
class Moved:
    """One way to have the reference, in a step."""

    traffic: Traffic
    flops: Flops
    time: Time


@dataclass(frozen=True)
class Outcome:
    """What a setting needs."""

    setting: Setting
    gpu: GpuMemory
    host: HostMemory
    by_mode: dict[str, Moved]
    mode: str
    """The recipe's own, in its first epoch; `cached` where no reference is needed."""
    problems: tuple[str, ...]
    """Why it cannot run at all, whatever the memory."""

    @property
    def gpu_spare_bytes(self) -> int:
        """What is left of a GPU; negative: what is lacking."""
        return self.setting.cluster.gpu_memory_bytes - self.gpu.total_bytes

    @property
    def host_spare_bytes(self) -> int | None:
        """Of a node; None where its memory was not given."""
        limit = self.setting.cluster.host_memory_bytes
        return None if limit is None else limit - self.host.total_bytes

    @property
    def fits(self) -> bool:
        host = self.host_spare_bytes
        return not self.problems and self.gpu_spare_bytes >= 0 and (host is None or host >= 0)

    @property
    def bound_seconds(self) -> float:
        """Of a step in the recipe's own mode."""
        return self.by_mode[self.mode].time.bound_seconds


@dataclass(frozen=True)
class Alternative:
    """Another setting, by what is to be given to have it."""

    changes: tuple[str, ...]
    outcome: Outcome


@dataclass(frozen=True)
class Plan:
    """Everything that `uft plan` says."""

    recipe_name: str
    structure: Structure
    outcome: Outcome
    disk: Disk
    files: tuple[Alternative, ...]
    """Every file of `ds_configs/`, the best one first."""
    remedies: tuple[Alternative, ...]
    """Changes one by one, the cheapest first; empty where the recipe fits."""
    combination: Alternative | None
    """Changes that fit together, where none of the remedies does alone."""
    mfu_flops: int
    assumptions: tuple[str, ...]

    @property
    def best_file(self) -> Alternative | None:
        return next((file for file in self.files if file.outcome.fits), None)


class Planner:
    """Plans settings of one model; what settings share is computed once."""

    def __init__(self, config: object) -> None:
        self._config = config
        self.structure = lru_cache(maxsize=None)(self._structure)
        self._activations = lru_cache(maxsize=None)(self._activations_of)

    def _structure(self, key: str) -> Structure:
        fields = json.loads(key)
        return structure_of(self._config, Lora(**fields))

    def structure_for(self, lora: Lora) -> Structure:
        """Adapters are part of a model's structure."""
        return self.structure(json.dumps(lora.__dict__))

    def _activations_of(
        self, lora: str, tokens: int, dtype: str, checkpointing: bool, lockstep: bool, attention: str
    ) -> Activations:
        return activations_of(
            self.structure(lora),
            tokens=tokens,
            dtype=dtype,
            gradient_checkpointing=checkpointing,
            lockstep=lockstep,
            attention=attention,
        )

    def activations(self, workload: Workload) -> Activations:
        """Of the largest micro-batch."""
        return self._activations(
            json.dumps(workload.lora.__dict__),
            workload.largest_micro_batch,
            workload.dtype,
            workload.gradient_checkpointing,
            workload.reference == "lockstep",
            workload.attention,
        )

    def plan(self, setting: Setting) -> Outcome:
        """One setting: memory, traffic, operations, time."""
        workload, sharding, cluster = setting.workload, setting.sharding, setting.cluster
        structure, activations = self.structure_for(workload.lora), self.activations(workload)
        own = "cached" if workload.reference == "none" else workload.reference
        by_mode = {}
        for mode in Modes if workload.reference != "none" else ("cached",):
            moved = traffic(structure, workload, sharding, cluster, self.gathers(setting, mode), activations)
            with_reference = mode != "cached"
            flops = step_flops(structure, workload, with_reference=with_reference)
            time = least_time(
                structure, workload, sharding, cluster, flops, moved, with_reference=with_reference
            )
            by_mode[mode] = Moved(moved, flops, time)
        return Outcome(
            setting=setting,
            gpu=gpu_memory(structure, workload, sharding, cluster, activations, self.gathers(setting, own)),
            host=host_memory(structure, workload, sharding, cluster, activations),
            by_mode=by_mode,
            mode=own,
            problems=tuple(_problems(setting)),
        )

    def gathers(self, setting: Setting, mode: str) -> Gathers | None:
        """Of a micro-step under ZeRO-3."""
        workload, sharding = setting.workload, setting.sharding
        if not sharding.shards_weights:
            return None
        structure = self.structure_for(workload.lora)
        return parts.micro_step_gathers(
            structure,
            structure.item_bytes(workload.dtype),
            sharding,
            passes=2 if mode == "separate" else 1,
            begins_with_forward=workload.begins_with_forward,
        )


def _problems(setting: Setting) -> Iterable[str]:
    workload, sharding, cluster = setting.workload, setting.sharding, setting.cluster
    if sharding.stage < 3 and workload.lora.dtype != workload.dtype:
        yield (
            f"{setting.deepspeed}: at ZeRO stage {sharding.stage} adapters are trained in the model's type: "
            f"lora.dtype={workload.dtype}"
        )
    if cluster.ranks % min(sharding.secondary, cluster.ranks):
        yield (
            f"{setting.deepspeed}: zero_hpz_partition_size {sharding.secondary} does not divide {cluster.ranks} ranks"
        )
    if sharding.weights_on == "nvme":
        yield f"{setting.deepspeed}: weights on NVMe are not planned"


def make_plan(recipe: Recipe, cluster: Cluster, *, tokens_per_response: int | None = None) -> Plan:
    """Plan a recipe.

    Args:
        tokens_per_response: mean, prompt included; None: `data.max_length`, the most there can be.
    Raises:
        UserError: the model's config is not to be had, or the recipe does not go with it.
    """
    config, source = model_config(recipe.model.base, recipe.model.revision)
    if tokens_per_response is not None and tokens_per_response > recipe.data.max_length:
        raise UserError(
            f"--tokens-per-response: {tokens_per_response} given, at most data.max_length {recipe.data.max_length}"
        )
    workload = workload_of(recipe, tokens_per_response=tokens_per_response)
    setting = Setting(workload, recipe.deepspeed, sharding_of(read_deepspeed_file(recipe.deepspeed)), cluster)
    planner = Planner(config)
    outcome = planner.plan(setting)
    files = _files(planner, setting)
    remedies = () if outcome.fits else tuple(_remedies(planner, outcome, files))
    structure = planner.structure_for(workload.lora)
    return Plan(
        recipe_name=recipe.name,
        structure=structure,
        outcome=outcome,
        disk=disk(structure, workload),
        files=files,
        remedies=remedies,
        combination=None if outcome.fits else _combination(planner, outcome, remedies),
        mfu_flops=mfu_flops(structure, workload, with_reference=outcome.mode != "cached"),
        assumptions=tuple(_assumptions(recipe, setting, source, tokens_per_response)),
    )


def _assumptions(recipe: Recipe, setting: Setting, source: str, given: int | None) -> Iterable[str]:
    workload, cluster = setting.workload, setting.cluster
    yield f"{recipe.model.base}: {source}"
    length = f"{workload.tokens_per_response} tokens a response, " + (
        "as given" if given is not None else "data.max_length (--tokens-per-response gives the mean)"
    )
    steps = workload.micro_steps(cluster.ranks)
    yield (
        f"{length}: {workload.tokens_per_step} tokens a step, {steps} micro-step{'s' * (steps > 1)} a rank; "
        "every token supervised"
    )
    if recipe.model.attention == "auto":
        yield "flash-attention 2 is installed on the GPUs (model.attention: auto takes sdpa otherwise)"
    yield "2 GB of a GPU for CUDA and NCCL, 5% for fragmentation; 4 GB of host memory a rank"
    yield "time: everything at the data sheet's figure, perfectly overlapped: a lower bound, not a forecast"


# ---- alternatives

Change = Callable[[Setting], Setting | None]


def _with_file(setting: Setting, name: str) -> Setting:
    """Another DeepSpeed file; below stage 3 with adapters in the model's type, as the engine asks."""
    sharding = sharding_of(read_deepspeed_file(name))
    workload = setting.workload
    if sharding.stage < 3:
        workload = replace(workload, lora=replace(workload.lora, dtype=workload.dtype))
    return replace(setting, workload=workload, deepspeed=name, sharding=sharding)


def _files(planner: Planner, setting: Setting) -> tuple[Alternative, ...]:
    """Every shipped file with the recipe as it is otherwise: those that fit first, the fastest of them first."""
    found = []
    for name in deepspeed_files():
        try:
            changed = _with_file(setting, name)
        except UserError:  # a file that this DeepSpeed does not take
            continue
        found.append(Alternative(_difference(setting, changed), planner.plan(changed)))
    return tuple(sorted(found, key=_by_worth))


def _by_worth(alternative: Alternative) -> tuple[bool, float, float, int]:
    outcome = alternative.outcome
    return (not outcome.fits, *_cost(outcome), -outcome.gpu_spare_bytes)


def _cost(outcome: Outcome) -> tuple[float, float]:
    """The least time of a step; of equal ones, how much has to hide behind it. In milliseconds: less is noise."""
    time = outcome.by_mode[outcome.mode].time
    return round(time.bound_seconds, 3), round(time.serial_seconds, 3)


def _remedies(planner: Planner, outcome: Outcome, files: tuple[Alternative, ...]) -> list[Alternative]:
    """Single changes that free memory where it is lacking; by what a step then costs, more GPUs last."""
    setting = outcome.setting
    found = [
        Alternative(_difference(setting, changed), planner.plan(changed))
        for changed in _changed_settings(setting)
    ] + [file for file in files if file.changes and not file.outcome.problems]
    helping = [alternative for alternative in found if _helps(alternative.outcome, outcome)]
    return sorted(
        helping,
        key=lambda a: (a.outcome.setting.cluster.ranks, *_cost(a.outcome), -a.outcome.gpu_spare_bytes),
    )


def _helps(changed: Outcome, before: Outcome) -> bool:
    """Whether more is left of what was lacking."""
    if changed.fits:
        return True
    if before.gpu_spare_bytes < 0 or before.problems:
        return changed.gpu_spare_bytes > before.gpu_spare_bytes and not changed.problems
    return (changed.host_spare_bytes or 0) > (before.host_spare_bytes or 0)


_SMALL_LOGITS = 128 * 2**20
_MOST_NODES = 64


def _changed_settings(setting: Setting) -> Iterable[Setting]:
    """Each single change that a recipe or a cluster offers."""
    workload, cluster = setting.workload, setting.cluster
    tokens = workload.tokens_per_micro_batch
    while tokens // 2 >= workload.max_length:
        tokens //= 2
        yield replace(setting, workload=replace(workload, tokens_per_micro_batch=tokens))
    if tokens > workload.max_length:
        yield replace(setting, workload=replace(workload, tokens_per_micro_batch=workload.max_length))
    if not workload.gradient_checkpointing:
        yield replace(setting, workload=replace(workload, gradient_checkpointing=True))
    elif not workload.activation_offload:
        yield replace(setting, workload=replace(workload, activation_offload=True))
    if workload.logits_bytes is None or workload.logits_bytes > _SMALL_LOGITS:
        yield replace(setting, workload=replace(workload, logits_bytes=_SMALL_LOGITS))
    if workload.lora.dtype == "float32" and workload.dtype != "float32":
        yield replace(setting, workload=replace(workload, lora=replace(workload.lora, dtype=workload.dtype)))
    yield from _larger_clusters(setting)


def _larger_clusters(setting: Setting) -> Iterable[Setting]:
    cluster = setting.cluster
    gpus = cluster.gpus
    while gpus * 2 <= 8:
        gpus *= 2
        yield replace(setting, cluster=replace(cluster, gpus=gpus))
    nodes = cluster.nodes
    while nodes * 2 <= _MOST_NODES:
        nodes *= 2
        yield replace(setting, cluster=replace(cluster, gpus=gpus, nodes=nodes))


def _combination(planner: Planner, outcome: Outcome, remedies: tuple[Alternative, ...]) -> Alternative | None:
    """The cheapest changes one upon the other until all fits, on the given GPUs first, then on more."""
    if any(remedy.outcome.fits for remedy in remedies):
        return None
    start = outcome.setting
    for cluster in (start.cluster, *(larger.cluster for larger in _larger_clusters(start))):
        for name in (start.deepspeed, *deepspeed_files()):
            try:
                tried = replace(_with_file(start, name), cluster=cluster)
            except UserError:
                continue
            for workload in _ever_smaller(tried.workload):
                found = planner.plan(replace(tried, workload=workload))
                if found.fits:
                    return Alternative(_difference(start, found.setting), found)
    return None


def _ever_smaller(workload: Workload) -> Iterable[Workload]:
    """The cheap changes first; each one keeps those before it."""
    yield workload
    workload = replace(workload, gradient_checkpointing=True)
    yield workload
    tokens = workload.tokens_per_micro_batch
    while tokens > workload.max_length:
        tokens = max(workload.max_length, tokens // 2)
        workload = replace(workload, tokens_per_micro_batch=tokens)
        yield workload
    workload = replace(workload, logits_bytes=min(workload.logits_bytes or _SMALL_LOGITS, _SMALL_LOGITS))
    yield workload
    yield replace(workload, activation_offload=True)


def _difference(before: Setting, after: Setting) -> tuple[str, ...]:
    """What to give to come from one setting to another: overrides, then options."""
    old, new = before.workload, after.workload
    logits = None if new.logits_bytes is None else new.logits_bytes // 2**20
    candidates = (
        ("deepspeed", before.deepspeed, after.deepspeed),
        ("lora.dtype", old.lora.dtype, new.lora.dtype),
        ("train.tokens_per_micro_batch", old.tokens_per_micro_batch, new.tokens_per_micro_batch),
        ("model.gradient_checkpointing", old.gradient_checkpointing, new.gradient_checkpointing),
        ("model.activation_offload", old.activation_offload, new.activation_offload),
        ("model.logits_mib", None if old.logits_bytes is None else old.logits_bytes // 2**20, logits),
        ("--gpus ", before.cluster.gpus, after.cluster.gpus),
        ("--nodes ", before.cluster.nodes, after.cluster.nodes),
    )
    return tuple(
        f"{key}{'' if key.endswith(' ') else '='}{str(new_value).lower() if isinstance(new_value, bool) else new_value}"
        for key, old_value, new_value in candidates
        if old_value != new_value
    )
