"""The picture of a run's course, from its metrics file alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
from matplotlib.axes import Axes

from uft_ds.record.curves import write_curves

LINES: list[dict[str, Any]] = [
    {"step": 0, "held_out/loss": 0.3, "held_out/implicit_reward/score": 0.0},
    {"step": 1, "loss": 0.25, "grad_norm": 1.5, "implicit_reward/instruction": 0.0, "implicit_reward/score": 0.0},
    {"step": 2, "loss": None, "grad_norm": None, "implicit_reward/instruction": 0.1, "implicit_reward/score": None},
    {"step": 3, "loss": 0.125, "grad_norm": 0.75, "implicit_reward/instruction": 0.3, "implicit_reward/score": -0.2},
    {"step": 3, "held_out/loss": 0.2, "held_out/implicit_reward/score": 0.1},
]
"""Held-out lines among training lines, and a skipped step with nulls."""


def test_curves_are_a_picture(tmp_path: Path) -> None:
    """A PNG, three times as wide as high at least, with something drawn on it."""
    write_curves(LINES, tmp_path / "curves.png")
    image = matplotlib.image.imread(tmp_path / "curves.png")
    height, width, _ = image.shape
    assert width > 3 * height
    assert image.min() < 0.5 < image.max()


def test_curves_show_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every point stands at its step; nulls and lines of the other kind are left out."""
    drawn: dict[str, list[tuple[float, float]]] = {}

    def record(axes: Axes, x: list[float], y: list[float], *, label: str, **style: Any) -> None:
        drawn[label] = list(zip(x, y, strict=True))

    monkeypatch.setattr(Axes, "plot", record)
    write_curves(LINES, tmp_path / "curves.png")
    assert drawn == {
        "training": [(1, 0.25), (3, 0.125)],
        "held out": [(0, 0.3), (3, 0.2)],
        "instruction": [(1, 0.0), (2, 0.1), (3, 0.3)],
        "score": [(1, 0.0), (3, -0.2)],
        "score, held out": [(0, 0.0), (3, 0.1)],
        "before clipping": [(1, 1.5), (3, 0.75)],
    }


def test_a_run_without_a_reference_has_no_empty_panel(tmp_path: Path) -> None:
    """Two panels of SFT, four inches each; the loss alone where nothing is known."""
    write_curves([{"step": 1, "loss": 0.5, "grad_norm": 1.0}], tmp_path / "two.png")
    write_curves([], tmp_path / "one.png")
    widths = [matplotlib.image.imread(tmp_path / name).shape[1] for name in ("two.png", "one.png")]
    assert widths == [880, 440]
