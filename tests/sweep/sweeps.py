"""A toy recipe and a sweep of it, in the working directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from uft_ds.sweep.file import Sweep, load_sweep

RECIPE: dict[str, Any] = {
    "name": "toy",
    "model": {"base": "base"},
    "data": {"sources": [{"format": "jsonl", "path": "rows.jsonl"}]},
    "output": "runs/toy",
}
SWEEP: dict[str, Any] = {
    "name": "both",
    "output": "runs/both",
    "runs": [
        {"name": "sft", "recipe": "toy.yaml", "set": {"objective.loss": "nll"}},
        {"name": "una", "recipe": "toy.yaml", "after": "sft"},
        {"name": "uft", "recipe": "toy.yaml"},
    ],
    "grid": {"train.lr": [1e-4, 3e-5], "train.seed": [1, 2]},
}


def write_toy_recipe() -> None:
    """In the working directory, where the sweep looks for it."""
    Path("toy.yaml").write_text(yaml.safe_dump(RECIPE))


def sweep_of(**changes: Any) -> Sweep:
    tree = {key: value for key, value in (SWEEP | changes).items() if value is not None}
    Path("sweep.yaml").write_text(yaml.safe_dump(tree))
    return load_sweep("sweep.yaml")
