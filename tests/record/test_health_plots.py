"""The picture of a run's health: what is drawn is what the table and the metrics say."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from suites import long_but
from toy import UFT

from uft_ds.record.health_plots import Health, write_health
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
    assert titles_of(write_health(lines, rows, path)) == ["held out: reliability", "held out: length bias"]
    height, width, _ = matplotlib.image.imread(path).shape
    assert width == pytest.approx(8 * 110, abs=1)
    assert height == pytest.approx(10 / 3 * 110, abs=1)
    rows["log_ratio"] = rows["reward"] = rows["implicit_score"] = np.nan
    assert write_health(lines, rows, path) == ((), "")
    assert not path.exists()
    assert write_health([], rows[:0], path) == ((), "")


def titles_of(health: Health) -> list[str]:
    return [panel.title for panel in health.panels]


@pytest.mark.parametrize("count", long_but([2, 7], range(1, 10)))
def test_the_grid_has_the_pictures_that_there_are(tmp_path: Path, count: int) -> None:
    """One to nine, in rows of three; each picture by itself is a part of the file."""
    metrics = (
        "score_error/score", "calibration_error/score", "pair_accuracy/pair", "length_correlation/score",
        "log_ratio_per_token/score", "saturated_stuck/score", "pair_margin/pair", "reward_chosen/pair",
        "logp_chosen/pair",
    )  # fmt: skip
    lines = [{"step": step} | dict.fromkeys(metrics[:count], step / 4) for step in (1, 2)]
    found, missing = write_health(lines, table()[:0], tmp_path / "health.png")
    assert len(found) == count
    assert not missing
    whole = pixels_of(tmp_path / "health.png")
    assert whole.shape[:2] == pytest.approx((-(-count // 3) * 10 / 3 * 110, min(count, 3) * 4 * 110), abs=1)
    for number, panel in enumerate(found):
        alone = pixels_of(io.BytesIO(panel.png))
        assert alone.min() < 128 < alone.max()
        height, width, _ = alone.shape
        assert 300 < height < 390
        assert 380 < width < 460
        top, left = number // 3 * 1100 / 3, number % 3 * 440
        near = whole[max(0, int(top) - 20) : int(top) + 400, max(0, left - 20) : left + 470]
        assert is_within(alone, near)


def pixels_of(picture: Any) -> np.ndarray:
    return np.asarray(np.round(matplotlib.image.imread(picture) * 255), dtype=np.uint8)


def is_within(part: np.ndarray, whole: np.ndarray) -> bool:
    """Whether a picture is cut out of another one: found by its middle row, and then compared as a whole."""
    height, width, channels = part.shape
    middle = part[height // 2].tobytes()
    found = [(y - height // 2, row.tobytes().find(middle) // channels) for y, row in enumerate(whole)]
    return any(x >= 0 and y >= 0 and np.array_equal(whole[y : y + height, x : x + width], part) for y, x in found)


INSTRUCTION = {"held_out/responses/instruction": 5.0, "held_out/score_error/instruction": 0.5}


@pytest.mark.parametrize(
    ("line", "missing"),
    [
        (INSTRUCTION | {"held_out/rank_correlation/instruction": None}, ""),
        (INSTRUCTION | {"responses/instruction": 3.0, "saturated_stuck/instruction": 0.0}, ""),
        ({"responses/score": 3.0, "score_error/score": 0.5}, ""),
        (
            INSTRUCTION | {"responses/instruction": 3.0, "responses/score": 3.0, "responses/pair": 2.0},
            "Trained on, but not held out: responses of kind score, pair.",
        ),
        (
            {"rank_correlation/score": None, "score_error/score": 0.5, "logp_chosen/pair": None},
            "Without a finite number: training: order, training: log-probs of the pairs' sides.",
        ),
        (
            INSTRUCTION | {"responses/score": 1.0, "held_out/calibration_error/instruction": None},
            "Trained on, but not held out: responses of kind score. Without a finite number: held out: calibration.",
        ),
    ],
    ids=["no order of one score", "same kinds", "nothing held out", "not held out", "undefined", "both"],
)
def test_what_one_would_expect_and_is_missing_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: dict[str, Any], missing: str
) -> None:
    """Below the pictures, and only then; what the run cannot have is not missed."""
    said: list[str] = []
    monkeypatch.setattr(Figure, "supxlabel", lambda figure, text, **style: said.append(text))
    lines = [{"step": 1, "loss": 0.5} | line]
    health = write_health(lines, table()[:0], tmp_path / "health.png")
    assert health.missing == missing
    assert " ".join(said).replace("\n", " ") == missing


def test_a_note_makes_the_picture_higher(tmp_path: Path) -> None:
    """It takes no room from what is drawn."""
    plain = INSTRUCTION | {"step": 1, "responses/instruction": 1.0}
    write_health([plain], table()[:0], tmp_path / "plain.png")
    write_health([plain | {"responses/binary": 1.0}], table()[:0], tmp_path / "noted.png")
    plain_height, noted_height = (len(matplotlib.image.imread(tmp_path / f"{name}.png")) for name in ("plain", "noted"))
    assert noted_height == pytest.approx(plain_height + 22, abs=2)


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
