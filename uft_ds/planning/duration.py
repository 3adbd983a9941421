"""How long a run takes: a lower bound, and a forecast for a given model FLOPs utilisation (MFU)."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from uft_ds.errors import UserError
from uft_ds.objectives.reference import HowReference
from uft_ds.planning.amount import Amount
from uft_ds.planning.compute import mfu_flops
from uft_ds.planning.planner import Outcome
from uft_ds.planning.structure import Structure
from uft_ds.recipe.settings import Settings
from uft_ds.recipe.to_settings import load_settings
from uft_ds.record.metrics_file import read_metrics
from uft_ds.record.run_folder import RunFolder

ASSUMED_MFU = 0.3
"""Taken where no run has measured it: an assumption.

With recomputation, which MFU does not count, it is a GPU that works at 40% of its peak.
"""

_WARM_UP_STEPS = 3
"""First steps of a run, which compile, allocate and fill caches: not counted in its MFU."""


@dataclass(frozen=True)
class Mfu:
    """The share of a GPU's peak FLOP/s that a run reaches, counted as the metric `mfu` counts it."""

    value: float
    origin: Literal["option", "measured", "assumed"]
    run: Path | None = None
    """The run that measured it."""


@dataclass(frozen=True)
class Duration:
    """Time of all training steps, without evaluations, checkpoints and the start; None where it is not known."""

    amount: Amount | None
    mfu: Mfu
    bound_seconds: float | None
    forecast_seconds: float | None


def mfu_of(settings: Settings, given: float | None) -> Mfu:
    """The MFU to forecast with: as given, as the run in the recipe's output folder measured it, or assumed.

    Raises:
        UserError: the given one is no share.
    """
    if given is not None:
        if not (math.isfinite(given) and 0 < given <= 1):
            raise UserError(f"--mfu: {given} given, expected a share of the peak, above 0 and at most 1, such as 0.35")
        return Mfu(given, "option")
    measured = _measured(settings)
    return Mfu(ASSUMED_MFU, "assumed") if measured is None else Mfu(measured, "measured", settings.output)


def _measured(settings: Settings) -> float | None:
    """Median MFU of the steps of the run in the output folder, if that run is of the same base in the same type."""
    folder = RunFolder(settings.output)
    if not (folder.recipe.is_file() and folder.metrics.is_file()):
        return None
    try:
        ran = load_settings(str(folder.recipe))
        values = [line["mfu"] for line in read_metrics(folder.metrics) if line.get("mfu")]
    except UserError:
        return None
    of_run, planned = ((Path(one.model.base).absolute(), one.model.dtype) for one in (ran, settings))
    is_measured = of_run == planned and len(values) > _WARM_UP_STEPS
    return statistics.median(values[_WARM_UP_STEPS:]) if is_measured else None


def duration_of(outcome: Outcome, structure: Structure, amount: Amount | None, mfu: Mfu) -> Duration:
    """Time of a run. The steps of its first epoch are in the recipe's mode, later ones may read a cached reference.

    For float32, whose peak the table of GPUs does not have, there is no forecast unless an option gave the peak.
    """
    if amount is None:
        return Duration(None, mfu, None, None)
    workload, cluster = outcome.setting.workload, outcome.setting.cluster
    knows_peak = cluster.has_own_flops or workload.dtype == "bfloat16"
    later: HowReference = "cached" if workload.caches_reference else outcome.mode
    steps = amount.responses / workload.examples_per_step  # the last one may be a part of one
    first = steps / max(amount.epochs or 1.0, 1.0)
    modes = ((outcome.mode, first), (later, steps - first))

    def forecast(mode: HowReference) -> float:
        flops = mfu_flops(structure, workload, with_reference=mode != "cached")
        at_mfu = flops / (mfu.value * cluster.gpu.flops_per_second * cluster.ranks)
        return max(at_mfu, outcome.by_mode[mode].time.bound_seconds)

    return Duration(
        amount,
        mfu,
        bound_seconds=sum(steps * outcome.by_mode[mode].time.bound_seconds for mode, steps in modes),
        forecast_seconds=sum(steps * forecast(mode) for mode, steps in modes) if knows_peak else None,
    )
