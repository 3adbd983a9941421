"""The pictures of a run, from its metrics file alone."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
from matplotlib.axes import Axes

from uft_ds.training.curves import write_curves, write_report
from uft_ds.training.run_folder import RunFolder

LINES: list[dict[str, Any]] = [
    {"step": 0, "held_out/loss": 0.3, "held_out/implicit_reward/score": 0.0},
    {"step": 1, "loss": 0.25, "grad_norm": 1.5, "implicit_reward/instruction": 0.0, "implicit_reward/score": 0.0},
    {"step": 2, "loss": None, "grad_norm": None, "implicit_reward/instruction": 0.1, "implicit_reward/score": None},
    {"step": 3, "loss": 0.125, "grad_norm": 0.75, "implicit_reward/instruction": 0.3, "implicit_reward/score": -0.2},
    {"step": 3, "held_out/loss": 0.2, "held_out/implicit_reward/score": 0.1},
]
"""Held-out lines among training lines, and a skipped step with nulls."""


def run_with(tmp_path: Path, lines: list[dict[str, Any]], *, recipe: str = "name: toy\n") -> RunFolder:
    folder = RunFolder(tmp_path)
    folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    folder.recipe.write_text(recipe)
    folder.data_report().parent.mkdir()
    folder.data_report().write_text('{"train": []}')
    return folder


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


@pytest.mark.parametrize("lines", [[], [{"step": 1, "loss": None}]], ids=["none", "null"])
def test_a_run_without_numbers_still_gets_a_report(tmp_path: Path, lines: list[dict[str, Any]]) -> None:
    """Nothing to draw is no error (and no warning): the run itself may be fine."""
    write_report(run_with(tmp_path, lines), "toy")
    assert (tmp_path / "report.html").stat().st_size > 1000


def test_the_report_holds_picture_numbers_and_recipe(tmp_path: Path) -> None:
    """One file: the picture is inside, byte for byte; the table has each metric's last value; no link leads out."""
    write_report(run_with(tmp_path, LINES), "toy run")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    embedded = re.search(r'src="data:image/png;base64,([^"]+)"', text)
    assert embedded is not None
    assert base64.b64decode(embedded[1]) == (tmp_path / "curves.png").read_bytes()
    assert embedded[1] not in text.replace(embedded[0], "", 1)
    rows = dict(re.findall(r"<tr><td>([^<]*)</td><td>([^<]*)</td></tr>", text))
    assert rows["loss"] == "0.125"
    assert rows["held_out/loss"] == "0.2"
    assert rows["step"] == "3"
    assert "<pre>name: toy\n</pre>" in text
    assert "<h1>toy run</h1>" in text
    assert not re.search(r"https?://|<link|<script", text)


def test_the_report_escapes_what_users_write(tmp_path: Path) -> None:
    """A run's name, a recipe, a data report and a metric's name are text, never markup."""
    attack = "</pre></title><script>alert('&')</script>"
    folder = run_with(tmp_path, [{"step": 1, "loss": 0.5, attack: 1.0}], recipe=f"name: {attack}\n")
    folder.data_report().write_text(json.dumps({"train": [{"source": attack}]}))
    write_report(folder, attack)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in text
    assert text.count("&lt;script&gt;alert(&#x27;&amp;&#x27;)") == 5, "title, heading, table, data, recipe"
