"""Other settings than a recipe's: other DeepSpeed files, single changes, and changes together; each one planned."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from uft_ds.engine.engine import deepspeed_files, read_deepspeed_file
from uft_ds.errors import UserError
from uft_ds.planning.hardware import Cluster
from uft_ds.planning.planner import Outcome, Planner, Setting
from uft_ds.planning.sharding import sharding_of
from uft_ds.planning.workload import Workload

FOR_CPU = "zero3_cpu"
"""The shipped file for ranks without a GPU: planned, so that it can be compared, but never advised."""


@dataclass(frozen=True)
class Alternative:
    """Another setting, by what is to be given to have it."""

    changes: tuple[str, ...]
    outcome: Outcome


def _with_file(setting: Setting, name: str) -> Setting:
    """Another DeepSpeed file; below stage 3 with adapters in the model's type, as the engine asks."""
    sharding = sharding_of(read_deepspeed_file(name))
    workload = setting.workload
    if sharding.stage < 3:
        workload = replace(workload, lora=replace(workload.lora, dtype=workload.dtype))
    return replace(setting, workload=workload, deepspeed=name, sharding=sharding)


def shipped_files(planner: Planner, setting: Setting) -> tuple[Alternative, ...]:
    """Every shipped file with the recipe as it is otherwise: those that fit first, the one to take before others."""
    found = []
    for name in deepspeed_files():
        try:
            changed = _with_file(setting, name)
        except UserError:  # a file that this DeepSpeed does not take
            continue
        found.append(Alternative(_difference(setting, changed), planner.plan(changed)))
    levels = _levels([file.outcome.bound_seconds for file in found])

    def worth(file: Alternative) -> tuple[bool, bool, int, int, bool, float, int]:
        """A recipe that changes least comes before one that is faster; what is sent decides between equals."""
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
    """A place in the order for each time; those within 1% of the least of them share it: less is noise."""
    levels: dict[float, int] = {}
    least, level = -1.0, -1
    for one in sorted(set(seconds)):
        if one > 1.01 * least or level < 0:
            least, level = one, level + 1
        levels[one] = level
    return levels


def remedies_for(planner: Planner, outcome: Outcome, files: tuple[Alternative, ...]) -> list[Alternative]:
    """Single changes that free memory where it is lacking; by what a step then costs, more GPUs last.

    One that frees no more than a cheaper one is left out.
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
    return kept


def _cost(alternative: Alternative, levels: Mapping[float, int]) -> tuple[int, float, int]:
    """The least time of a step; of equal ones, how much has to hide behind it."""
    outcome = alternative.outcome
    serial = outcome.by_mode[outcome.mode].time.serial_seconds
    return levels[outcome.bound_seconds], serial, -outcome.gpu_spare_bytes


def _breaks_another(changed: Outcome, before: Outcome) -> bool:
    """Whether a limit that was kept is not kept any more: the GPU's or the host's."""
    spare = zip(_spare(before), _spare(changed), strict=True)
    return any(was >= 0 > now for was, now in spare)


def _spare(outcome: Outcome) -> tuple[int, int]:
    return outcome.gpu_spare_bytes, outcome.host_spare_bytes or 0


def _left(changed: Outcome, before: Outcome) -> tuple[bool, int]:
    """Whether a change is enough, and what it leaves of what was lacking."""
    lacks_gpu = before.gpu_spare_bytes < 0 or before.problems
    return changed.fits, changed.gpu_spare_bytes if lacks_gpu else changed.host_spare_bytes or 0


_SMALL_LOGITS = 128 * 2**20
_MOST_GPUS, _MOST_NODES = 8, 64


def _changed_settings(setting: Setting) -> Iterable[Setting]:
    """Each single change that a recipe offers."""
    workload = setting.workload
    tokens = workload.tokens_per_micro_batch
    while tokens // 2 >= workload.least_micro_batch:
        tokens //= 2
        yield replace(setting, workload=replace(workload, tokens_per_micro_batch=tokens))
    if tokens > workload.least_micro_batch:
        yield replace(setting, workload=replace(workload, tokens_per_micro_batch=workload.least_micro_batch))
    if not workload.gradient_checkpointing:
        yield replace(setting, workload=replace(workload, gradient_checkpointing=True))
    elif not workload.activation_offload:
        yield replace(setting, workload=replace(workload, activation_offload=True))
    if workload.activation_offload:
        yield replace(setting, workload=replace(workload, activation_offload=False))
    if workload.logits_bytes is None or workload.logits_bytes > _SMALL_LOGITS:
        yield replace(setting, workload=replace(workload, logits_bytes=_SMALL_LOGITS))
    if workload.lora.dtype == "float32" and workload.dtype != "float32":
        yield replace(setting, workload=replace(workload, lora=replace(workload.lora, dtype=workload.dtype)))


def larger_clusters(setting: Setting) -> tuple[Cluster, ...]:
    """More GPUs a node, then more nodes; no more ranks than a step has units, for those would have nothing to do."""
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
    """Larger clusters up to the first that fits."""
    for cluster in larger_clusters(setting):
        changed = replace(setting, cluster=cluster)
        found = Alternative(_difference(setting, changed), planner.plan(changed))
        yield found
        if found.outcome.fits:
            return


def combination_for(planner: Planner, outcome: Outcome, remedies: tuple[Alternative, ...]) -> Alternative | None:
    """The cheapest changes one upon the other until all fits: on the given GPUs, or on more where nothing else fits."""
    start = outcome.setting
    fitting = [remedy.outcome.setting.cluster for remedy in remedies if remedy.outcome.fits]
    if start.cluster in fitting:
        return None
    larger = () if fitting else larger_clusters(start)
    for cluster in (start.cluster, *larger):
        for name in (start.deepspeed, *(name for name in deepspeed_files() if name != FOR_CPU)):
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
    while tokens > workload.least_micro_batch:
        tokens = max(workload.least_micro_batch, tokens // 2)
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
