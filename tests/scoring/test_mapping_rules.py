"""Rules from raw values to scores, against arithmetic and a brute force."""

from __future__ import annotations

import json
import math
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from uft_ds.errors import UserError
from uft_ds.scoring.isotonic import isotonic_fit
from uft_ds.scoring.mapping import map_named


@pytest.mark.parametrize(
    ("rule", "raw", "score"),
    [
        ("sigmoid", 0.0, 0.5),
        ("sigmoid", math.log(3), 0.75),
        ("sigmoid", -1000.0, 0.0),
        ("affine:1,10", 1.0, 0.0),
        ("affine:1,10", 5.5, 0.5),
        ("affine:10,1", 10.0, 0.0),
        ("affine:10,1", 1.0, 1.0),
        ("affine:-2,2", 1.0, 0.75),
    ],
)
def test_a_rule_maps_by_its_formula(rule: str, raw: float, score: float) -> None:
    """By hand; bounds the other way round turn the order."""
    assert map_named(rule, (), "s")(raw) == pytest.approx(score, abs=1e-12)


def test_quantiles_are_the_share_that_is_lower() -> None:
    """Of 1, 2, 2, 5: 1/8, then (1 + 1) / 4, then 7/8."""
    mapped = map_named("quantile", (5.0, 2.0, 1.0, 2.0), "s")
    assert [mapped(raw) for raw in (1.0, 2.0, 5.0)] == [0.125, 0.5, 0.875]


@pytest.mark.parametrize("raw", [0.99, 10.01, -1e300])
def test_a_value_outside_is_no_score(raw: float) -> None:
    """Not the nearest one either."""
    with pytest.raises(ValueError, match="not from 1 to 10"):
        map_named("affine:1,10", (), "s")(raw)


@pytest.mark.parametrize(
    "rule",
    [
        *("sigmoid:1", "quantiles", "affine", "affine:1", "affine:1,1", "affine:a,b", "affine:0,inf", "isotonic", ""),
        "affine:-1e308,1e308",  # their difference is infinite, so every score would be 0
    ],
)
def test_an_unknown_rule_is_refused(rule: str) -> None:
    """Before anything is scored, with what was expected."""
    with pytest.raises(UserError, match=r"--map.*expected"):
        map_named(rule, (), "s")


_POINTS = st.lists(st.tuples(st.integers(-5, 5), st.integers(0, 4)), min_size=1, max_size=12)


@given(_POINTS)
def test_isotonic_is_the_best_of_all_monotone_functions(points: list[tuple[int, int]]) -> None:
    """The min-max formula gives the optimum: at i the largest, over j <= i, of the least mean of j..k over k >= i."""
    raw = np.array([float(x) for x, _ in points])
    target = np.array([y / 4 for _, y in points])
    values, fitted = isotonic_fit(raw, target)
    assert values.tolist() == sorted(set(raw.tolist()))

    def mean(j: int, k: int) -> float:
        return float(target[(raw >= values[j]) & (raw <= values[k])].mean())

    n = len(values)
    expected = [max(min(mean(j, k) for k in range(i, n)) for j in range(i + 1)) for i in range(n)]
    assert fitted == pytest.approx(expected, abs=1e-12)


def calibration(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_calibration_is_linear_between_its_blocks(tmp_path: Path) -> None:
    """Raw 0, 1, 2, 3 with targets 0, 1, 0, 1: blocks 0, 1/2, 1/2, 1; half way between 2 and 3 it is 3/4."""
    rows = [{"raw": raw, "target": target} for raw, target in ((0, 0), (1, 1), (2, 0), (3, 1))]
    mapped = map_named(f"isotonic:{calibration(tmp_path / 'c.jsonl', rows)}", (), "s")
    assert [mapped(raw) for raw in (0.0, 1.0, 1.5, 2.0, 2.5, 3.0)] == [0.0, 0.5, 0.5, 0.5, 0.75, 1.0]
    for outside in (-0.1, 3.1):
        with pytest.raises(ValueError, match="outside of the calibration's"):
            mapped(outside)


def test_rows_that_were_scored_calibrate(tmp_path: Path) -> None:
    """Of `uft score` on data with scores or labels, pairs too, by the same scorer."""
    scoring = {"scorer": "length#1", "raw": 1.0, "given": 0.0}
    pair = {"scorer": "length#1", "raw": [3.0, 2.0], "given": [1.0, 0.5]}
    rows = [{"prompt": "p", "meta": {"scoring": value}} for value in (scoring, pair)]
    path = calibration(tmp_path / "c.jsonl", rows)
    assert [map_named(f"isotonic:{path}", (), "length#1")(raw) for raw in (1.0, 2.0, 3.0)] == [0.0, 0.5, 1.0]
    with pytest.raises(UserError, match=r"c\.jsonl:1: scored by length#1, expected other#2"):
        map_named(f"isotonic:{path}", (), "other#2")


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"raw": 1, "target": 2}], r"c\.jsonl:1: 'target': found 2, expected a number from 0 to 1"),
        ([{"raw": "1", "target": 1}], r"c\.jsonl:1: 'raw': found '1'"),
        ([{"prompt": "p"}], r"c\.jsonl:1: neither"),
        ([{"raw": 1, "target": 1}, {"raw": 1, "target": 0}], "1 different raw scores"),
        ([{"meta": {"scoring": {"scorer": "s", "raw": 1}}}], "had no scores or labels"),
    ],
)
def test_a_file_that_cannot_calibrate_is_refused(rows: list[object], said: str, tmp_path: Path) -> None:
    """By file and line."""
    with pytest.raises(UserError, match=said):
        map_named(f"isotonic:{calibration(tmp_path / 'c.jsonl', rows)}", (), "s")
