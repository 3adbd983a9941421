"""Alternatives to a recipe's setting: other DeepSpeed files, single changes, and combinations, each fully planned.

Of two alternatives that fit the cheaper one is that with the lower bound of a step's time, on the given GPUs first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from uft_ds.engine.deepspeed_file import deepspeed_files, read_deepspeed_file
from uft_ds.errors import UserError
from uft_ds.planning.hardware import Cluster
from uft_ds.planning.planner import Outcome, Planner, Setting
from uft_ds.planning.sharding import sharding_of
from uft_ds.planning.workload import Workload

FOR_CPU = "zero3_cpu"
"""The shipped file for ranks without a GPU: planned for comparison, but never recommended."""

_NOISE = 1.01
"""Times within 1% of each other count as equal."""


@dataclass(frozen=True)
class Alternative:
    """Another setting, described by the overrides and options that select it."""

    changes: tuple[str, ...]
    outcome: Outcome


def _with_file(setting: Setting, name: str) -> Setting:
    """The setting with another DeepSpeed file; below stage 3 adapters get the model's dtype, as the engine needs."""
    sharding = sharding_of(read_deepspeed_file(name))
    workload = setting.workload
    if sharding.stage < 3:
        workload = replace(workload, lora=replace(workload.lora, dtype=workload.dtype))
    return replace(setting, workload=workload, deepspeed=name, sharding=sharding)


def shipped_files(
    planner: Planner, setting: Setting, chosen: Callable[[Setting], Setting] | None = None
) -> tuple[Alternative, ...]:
    """The recipe's and every shipped DeepSpeed file, the recipe otherwise unchanged; those that fit first, the best one
    first.

    Args:
        chosen: what the recipe leaves open, chosen for a file; None: it leaves nothing open.
    """
    found = []
    for name in dict.fromkeys((setting.deepspeed, *deepspeed_files())):
        try:
            changed = _with_file(setting, name)
        except UserError:  # a file that the installed DeepSpeed refuses
            continue
        changes = _difference(setting, changed)  # without what is chosen: that is no change of the recipe
        found.append(Alternative(changes, planner.plan(changed if chosen is None else chosen(changed))))
    levels = _levels([file.outcome.bound_seconds for file in found])

    def worth(file: Alternative) -> tuple[bool, bool, int, int, bool, float, int]:
        """Sort key: fewer changes to the recipe count more than speed; equal times are ordered by traffic."""
        outcome = file.outcome
        return (
            not outcome.fits,
            outcome.setting.deepspeed == FOR_CPU,
            len([change for change in file.changes if not change.startswith("deepspeed=")]),
            levels[outcome.bound_seconds],
            bool(file.changes),
            outcome.by_mode[outcome.mode].time.links_seconds,
            -outcome.gpu_spare_bytes,
        )

    return tuple(sorted(found, key=worth))


def _levels(seconds: Iterable[float]) -> dict[float, int]:
    """A level for each time. Times within 1% of the smallest of a level share it: smaller differences are noise."""
    levels: dict[float, int] = {}
    least, level = -1.0, -1
    for one in sorted(set(seconds)):
        if one > _NOISE * least or level < 0:
            least, level = one, level + 1
        levels[one] = level
    return levels


def remedies_for(planner: Planner, outcome: Outcome, files: tuple[Alternative, ...]) -> list[Alternative]:
    """Single changes that free the memory that is lacking: those that suffice, then those that do not.

    Each part is ordered by the cost of a step, more GPUs last. A change that frees no more than a cheaper one is left
    out.
    """
    setting = outcome.setting
    found = [
        Alternative(_difference(setting, changed), planner.plan(changed)) for changed in _changed_settings(setting)
    ]
    found += [*_enough_of_them(planner, setting)]
    found += [file for file in files if file.changes and file.outcome.setting.deepspeed != FOR_CPU]
    found = [one for one in found if not one.outcome.problems and not _breaks_another(one.outcome, outcome)]
    levels = _levels([alternative.outcome.bound_seconds for alternative in found])
    by_cost = sorted(found, key=lambda a: (a.outcome.setting.cluster.ranks, *_cost(a, levels)))
    kept: list[Alternative] = []
    ranks, most = 0, (False, 0)
    for alternative in by_cost:
        if alternative.outcome.setting.cluster.ranks != ranks:
            ranks, most = alternative.outcome.setting.cluster.ranks, _left(outcome, outcome)
        left = _left(alternative.outcome, outcome)
        if left > most:
            most = left
            kept.append(alternative)
    return sorted(kept, key=lambda one: not one.outcome.fits)


def _cost(alternative: Alternative, levels: Mapping[float, int]) -> tuple[int, float, int]:
    """Sort key: the least time of a step, then the time without any overlap, then the spare memory."""
    outcome = alternative.outcome
    serial = outcome.by_mode[outcome.mode].time.serial_seconds
    return levels[outcome.bound_seconds], serial, -outcome.gpu_spare_bytes


def _breaks_another(changed: Outcome, before: Outcome) -> bool:
    """Whether a change exceeds a limit (the GPU's or the host's memory) that was kept before."""
    spare = zip(_spare(before), _spare(changed), strict=True)
    return any(was >= 0 > now for was, now in spare)


def _spare(outcome: Outcome) -> tuple[int, int]:
    return outcome.gpu_spare_bytes, outcome.host_spare_bytes or 0


def _left(changed: Outcome, before: Outcome) -> tuple[bool, int]:
    """Whether a change is sufficient, and the spare bytes of the memory that was lacking before."""
    lacks_gpu = before.gpu_spare_bytes < 0 or before.problems
    return changed.fits, changed.gpu_spare_bytes if lacks_gpu else changed.host_spare_bytes or 0


_SMALL_LOGITS = 128 * 2**20
_MOST_GPUS, _MOST_NODES = 8, 64


def _changed_settings(setting: Setting) -> Iterable[Setting]:
    """Each single change of the recipe that can save memory."""
    workload = setting.workload
    tokens = workload.tokens_per_micro_batch
    while tokens // 2 >= workload.least_micro_batch:
        tokens //= 2
        yield replace(setting, workload=replace(workload, tokens_per_micro_batch=tokens))
    if tokens > workload.least_micro_batch:
        yield replace(setting, workload=replace(workload, tokens_per_micro_batch=workload.least_micro_batch))
    if workload.gradient_checkpointing is False:
        yield replace(setting, workload=replace(workload, gradient_checkpointing="selective"))
    if workload.gradient_checkpointing is not True:
        yield replace(setting, workload=replace(workload, gradient_checkpointing=True))
    elif not workload.activation_offload:
        yield replace(setting, workload=replace(workload, activation_offload=True))
    if workload.activation_offload:
        yield replace(setting, workload=replace(workload, activation_offload=False))
    has_logits = not workload.lora.has_reward_head
    if has_logits and (workload.logits_bytes is None or workload.logits_bytes > _SMALL_LOGITS):
        yield replace(setting, workload=replace(workload, logits_bytes=_SMALL_LOGITS))
    if workload.lora.dtype == "float32" and workload.dtype != "float32":
        yield replace(setting, workload=replace(workload, lora=replace(workload.lora, dtype=workload.dtype)))


def larger_clusters(setting: Setting) -> tuple[Cluster, ...]:
    """Clusters with more GPUs per node, then more nodes; at most one rank per unit of a step, so that none is idle."""
    cluster, workload = setting.cluster, setting.workload
    useful = workload.examples_per_step // workload.unit
    found = []
    while cluster.gpus * 2 <= _MOST_GPUS and cluster.ranks * 2 <= useful:
        cluster = replace(cluster, gpus=cluster.gpus * 2)
        found.append(cluster)
    while cluster.nodes * 2 <= _MOST_NODES and cluster.ranks * 2 <= useful:
        cluster = replace(cluster, nodes=cluster.nodes * 2)
        found.append(cluster)
    return tuple(found)


def _enough_of_them(planner: Planner, setting: Setting) -> Iterable[Alternative]:
    """Plans on larger clusters, up to and including the first that fits."""
    for cluster in larger_clusters(setting):
        changed = replace(setting, cluster=cluster)
        found = Alternative(_difference(setting, changed), planner.plan(changed))
        yield found
        if found.outcome.fits:
            return


def combination_for(planner: Planner, outcome: Outcome, remedies: tuple[Alternative, ...]) -> Alternative | None:
    """Several changes that fit together where no single one does, or where each that does makes steps slower.

    On the given GPUs; on more of them only if nothing else fits. None if a single remedy is as cheap, or if no
    combination fits.
    """
    start = outcome.setting
    fitting = [remedy for remedy in remedies if remedy.outcome.fits]
    single = next((remedy for remedy in fitting if remedy.outcome.setting.cluster == start.cluster), None)
    if single is not None and single.outcome.bound_seconds <= _NOISE * outcome.bound_seconds:
        return None  # it costs nothing: no combination is cheaper
    found = _cheapest_combination(planner, start, start.cluster)
    if single is not None:
        is_cheaper = found is not None and _NOISE * found.outcome.bound_seconds < single.outcome.bound_seconds
        return found if is_cheaper else None
    if found is not None or fitting:
        return found
    larger = (_cheapest_combination(planner, start, cluster) for cluster in larger_clusters(start))
    return next((one for one in larger if one is not None), None)


def _cheapest_combination(planner: Planner, start: Setting, cluster: Cluster) -> Alternative | None:
    """On one cluster, of each file's first combination that fits the one with the shortest step; the own file first."""
    fitting = []
    for name in (start.deepspeed, *(name for name in deepspeed_files() if name not in (start.deepspeed, FOR_CPU))):
        try:
            tried = replace(_with_file(start, name), cluster=cluster)
        except UserError:
            continue
        for workload in _ever_smaller(tried.workload):
            found = planner.plan(replace(tried, workload=workload))
            if found.fits:
                fitting.append(Alternative(_difference(start, found.setting), found))
                break
    levels = _levels([one.outcome.bound_seconds for one in fitting])
    return min(fitting, key=lambda one: levels[one.outcome.bound_seconds], default=None)


def _ever_smaller(workload: Workload) -> Iterable[Workload]:
    """Workloads that need less and less memory; cheap changes come first, and each keeps those before it."""
    yield workload
    workload = replace(workload, gradient_checkpointing=True)
    yield workload
    tokens = workload.tokens_per_micro_batch
    while tokens > workload.least_micro_batch:
        tokens = max(workload.least_micro_batch, tokens // 2)
        workload = replace(workload, tokens_per_micro_batch=tokens)
        yield workload
    if not workload.lora.has_reward_head:
        workload = replace(workload, logits_bytes=min(workload.logits_bytes or _SMALL_LOGITS, _SMALL_LOGITS))
        yield workload
    yield replace(workload, activation_offload=True)


def _difference(before: Setting, after: Setting) -> tuple[str, ...]:
    """The overrides and command options that lead from one setting to another."""
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
