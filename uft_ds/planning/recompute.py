"""`model.gradient_checkpointing: auto`: the least that is computed again, of what the plan has memory for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from uft_ds.planning.planner import Outcome, Planner, Setting
from uft_ds.streams.recompute import Recompute

SPARE = 1.1
"""The plan's peak memory times this must fit: planned and measured activations differ by up to a tenth."""

_BY_SPEED: tuple[Recompute, ...] = (False, "selective")


def fastest_that_fits(planner: Planner, setting: Setting, fits: Callable[[Outcome], bool]) -> Setting:
    """The setting with the fastest mode that fits; `true`, which needs the least memory, where none does."""
    for mode in _BY_SPEED:
        tried = replace(setting, workload=replace(setting.workload, gradient_checkpointing=mode))
        if fits(planner.plan(tried)):
            return tried
    return replace(setting, workload=replace(setting.workload, gradient_checkpointing=True))


def fits_gpu(outcome: Outcome) -> bool:
    """Whether a GPU of the planned cluster has the memory, and some to spare."""
    return outcome.gpu.total_bytes * SPARE <= outcome.setting.cluster.gpu_memory_bytes
