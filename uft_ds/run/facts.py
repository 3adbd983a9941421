"""What a finished run was, in a few lines for its report."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

from uft_ds.host.terminal import duration
from uft_ds.recipe.settings import Settings
from uft_ds.record.metrics_file import read_metrics
from uft_ds.record.run_folder import RunFolder

_DATE = "%Y-%m-%d %H:%M %Z"


def facts_of(settings: Settings, folder: RunFolder, *, trained: int, ranks: int, ended: datetime) -> dict[str, str]:
    """Base, dates, steps, what was trained and how, by name.

    Args:
        trained: number of trained parameters.
        ended: local time.
    """
    model = settings.model
    lines = [line for line in read_metrics(folder.metrics) if "grad_norm" in line]
    loss, beta = (settings.stored["objective"][key] for key in ("loss", "beta"))
    how = "of a reward head" if settings.trains_head else f"beta {_words(beta)}"
    return {
        "base": model.base + (f", revision {model.revision}" if model.revision else ""),
        "began": _began(folder),
        "ended": ended.strftime(_DATE),
        "time of the steps": f"{duration(sum(line['seconds'] or 0 for line in lines))}, without start and evaluations",
        "steps": f"{len(lines):,} with {_responses(lines):,} responses",
        "trained": f"{_trained(settings)}: {trained:,} parameters",
        "objective": f"loss {_words(loss)}, {how}, learning rate {settings.train.lr:g}",
        "ran on": f"{ranks} ranks, {model.dtype}, DeepSpeed file {settings.deepspeed.name}",
    }


def _trained(settings: Settings) -> str:
    if settings.trains_all:
        return "all"
    lora = settings.adapters
    targets = lora.targets if isinstance(lora.targets, str) else ", ".join(lora.targets)
    targets += ", and the routed experts" if lora.experts else ""
    head = ", and a reward head" if settings.trains_head else ""
    return f"LoRA of rank {lora.rank} (alpha {lora.alpha:g}) on {targets}{head}"


def _began(folder: RunFolder) -> str:
    """When the run was prepared, and the steps at which it was resumed."""
    try:
        environment = json.loads(folder.environment.read_text(encoding="utf-8"))
        began = datetime.fromisoformat(environment["date"]).strftime(_DATE)
        resumes = ", ".join(str(resume["step"]) for resume in environment.get("resumes", []))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return "not known"
    return f"{began}; resumed at step {resumes}" if resumes else began


def _responses(lines: list[dict[str, Any]]) -> int:
    return sum(int(value or 0) for line in lines for name, value in line.items() if name.startswith("responses/"))


def _words(value: Any) -> str:
    """A value of the recipe in one line: `mse`, `{pair: dpo, score: mse}`."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_words(inner)}" for key, inner in value.items()) + "}"
    return f"{value:g}" if isinstance(value, float) else str(value)
