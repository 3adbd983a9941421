"""The picture of a run's health: what is drawn is what the table and the metrics say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from matplotlib.axes import Axes
from toy import UFT

from uft_ds.record.health_plots import write_health
from uft_ds.record.telemetry import ROW, implicit_scores

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
    rows["pair_reward"] = np.nan
    rows["pair_reward"][chosen + 1] = -1.0
    rows["pair_reward"][chosen] = -1.0 + np.where(np.arange(num_pairs) % 4, 0.1, -0.1)
    rows["implicit_score"] = implicit_scores(UFT, rows)
    return rows


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Drawn:
    """What each method of the axes was given, by its name."""
    calls: Drawn = {"scatter": [], "hist": [], "plot": [], "set_title": []}

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
    assert min(implicit) >= scored["implicit_score"].min()
    assert max(given) <= scored["score"].max()
    (tokens, ratios), _ = drawn["scatter"][2]
    assert tokens.tolist() == scored["tokens"].tolist()
    assert ratios.tolist() == scored["log_ratio"].tolist()
    ((margins,), style) = drawn["hist"][0]
    assert len(margins) == 20
    assert style["label"] == "75% above 0"


def test_pictures_without_numbers_are_left_out(tmp_path: Path) -> None:
    """Of a run without pairs two of nine are drawn, in one row; without a reference none, and there is no file."""
    rows, lines, path = table(0), [{"step": 1, "loss": 1.0}], tmp_path / "health.png"
    assert write_health(lines, rows, path)
    height, width, _ = matplotlib.image.imread(path).shape
    assert width == pytest.approx(8 * 110, abs=1)
    assert height == pytest.approx(10 / 3 * 110, abs=1)
    rows["log_ratio"] = rows["reward"] = rows["implicit_score"] = np.nan
    assert not write_health(lines, rows, path)
    assert not path.exists()
    assert not write_health([], rows[:0], path)


def lines_of(prefix: str) -> list[dict[str, Any]]:
    """Two steps, with all that is pictured; at the first, as before every update, there is no order."""
    kinds = [
        f"{name}/{kind}"
        for kind in ("score", "pair")
        for name in (
            "score_error",
            "calibration_error",
            "rank_correlation",
            "length_correlation",
            "log_ratio_per_token",
        )
    ]
    of_pairs = ("pair_accuracy", "pair_margin", "implicit_reward_chosen", "implicit_reward_rejected", "logp_chosen")
    names = [*kinds, *(f"{name}/pair" for name in (*of_pairs, "logp_rejected")), "saturated_fitted/score"]
    names.append("saturated_stuck/score")
    found = [{"step": step} | {f"{prefix}{name}": step + 0.5 for name in ("loss", *names)} for step in (1, 2)]
    return [found[0] | {f"{prefix}rank_correlation/{kind}": None for kind in ("score", "pair")}, found[1]]


def test_nothing_held_out_is_no_empty_picture(tmp_path: Path, drawn: Drawn) -> None:
    """All nine are of the training responses: lines over the steps, and none is left out."""
    write_health(lines_of(""), table()[:0], tmp_path / "health.png")
    assert matplotlib.image.imread(tmp_path / "health.png").shape[:2] == (1100, 1320)
    assert not drawn["scatter"]
    assert not drawn["hist"]
    titles = [title for (title, *_), _ in drawn["set_title"]]
    assert len(titles) == 9
    assert all(title.startswith("training: ") for title in titles)
    assert len(drawn["plot"]) == 4 * 2 + 3 + 2 + 1 + 2 * 2
    assert (2,) in {tuple(steps) for (steps, _), _ in drawn["plot"]}, "null is no point"


def test_both_parts_are_drawn_where_data_is_held_out(tmp_path: Path, drawn: Drawn) -> None:
    """The table, held-out metrics over the steps, and of the training the saturation and both sides of the pairs, log-
    probs beside rewards."""
    write_health(lines_of("") + lines_of("held_out/"), table(), tmp_path / "health.png")
    titles = [title for (title, *_), _ in drawn["set_title"]]
    assert [title.split(":")[0] for title in titles].count("held out") == 6
    marked = [style["label"] for _, style in drawn["plot"] if "marker" in style]
    assert marked == ["score", "pair", "score: rank", "pair: rank", "pair: accuracy", "score", "pair"]
    of_training = [style["label"] for _, style in drawn["plot"] if "label" in style and "marker" not in style]
    assert of_training == ["score: fitted", "score: stuck", "chosen", "rejected", "chosen", "rejected"]


def test_margins_are_of_the_losses_own_reward(tmp_path: Path, drawn: Drawn) -> None:
    """Also without a reference."""
    rows = table()
    rows["log_ratio"] = rows["reward"] = rows["implicit_score"] = np.nan
    write_health([], rows, tmp_path / "health.png")
    ((margins,), _) = drawn["hist"][0]
    assert sorted({round(margin, 6) for margin in margins}) == [-0.1, 0.1]
