"""The picture of a run's health: what is drawn is what the table and the metrics say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from matplotlib.axes import Axes

from uft_ds.training.health_plots import write_health
from uft_ds.training.telemetry import ROW, implicit_scores

Drawn = dict[str, list[Any]]


def table(num_pairs: int = 20) -> np.ndarray:
    """Ten scored responses, and pairs whose chosen side has the higher reward in three of four cases."""
    rng = np.random.default_rng(0)
    rows = np.zeros(10 + 2 * num_pairs, dtype=ROW)
    rows["kind"][:10], rows["pair"][:10] = 1, -1
    rows["kind"][10:], rows["pair"][10:] = 3, np.repeat(np.arange(num_pairs), 2)
    rows["score"], rows["tokens"] = rng.random(len(rows)), rng.integers(1, 50, len(rows))
    rows["log_ratio"] = rng.normal(size=len(rows))
    rows["reward"] = rows["log_ratio"] * 0.1
    chosen = np.arange(num_pairs) * 2 + 10
    rows["reward"][chosen] = rows["reward"][chosen + 1] + np.where(np.arange(num_pairs) % 4, 0.1, -0.1)
    return rows


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Drawn:
    """What each method of the axes was given, by its name."""
    calls: Drawn = {"scatter": [], "hist": [], "text": []}

    def record(name: str) -> None:
        original = getattr(Axes, name)

        def recording(axes: Axes, *values: Any, **style: Any) -> Any:
            calls[name].append((values, style))
            return original(axes, *values, **style)

        monkeypatch.setattr(Axes, name, recording)

    for name in calls:
        record(name)
    return calls


def test_the_table_is_drawn(tmp_path: Path, drawn: Drawn) -> None:
    """Reliability and length of both kinds, margins of all pairs, with the share above 0."""
    rows = table()
    write_health([], rows, tmp_path / "health.png")
    assert matplotlib.image.imread(tmp_path / "health.png").min() < 0.5
    labels = [style["label"] for _, style in drawn["scatter"]]
    assert labels == ["score", "pair", "score", "pair"]
    (implicit, given), _ = drawn["scatter"][0]
    scored = rows[rows["kind"] == 1]
    assert min(implicit) >= implicit_scores(scored).min()
    assert max(given) <= scored["score"].max()
    (tokens, ratios), _ = drawn["scatter"][2]
    assert tokens.tolist() == scored["tokens"].tolist()
    assert ratios.tolist() == scored["log_ratio"].tolist()
    ((margins,), style) = drawn["hist"][0]
    assert len(margins) == 20
    assert style["label"] == "75% above 0"


@pytest.mark.parametrize("has_reference", [True, False])
def test_a_run_without_pairs_or_reference_says_so(tmp_path: Path, drawn: Drawn, has_reference: bool) -> None:
    """Empty pictures are labelled, and nothing is a warning."""
    rows = table(0)
    if not has_reference:
        rows["log_ratio"] = rows["reward"] = np.nan
    write_health([{"step": 1, "loss": 1.0}], rows, tmp_path / "health.png")
    assert len(drawn["text"]) == (4 if has_reference else 6)
    write_health([], rows[:0], tmp_path / "health.png")
    assert len(drawn["text"]) == (10 if has_reference else 12)
