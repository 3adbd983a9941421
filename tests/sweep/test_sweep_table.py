"""The table of a sweep in a terminal: what tells the runs apart, and which is the best."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
from rich.console import Console
from sweeps import sweep_of

from uft_ds.sweep.file import Sweep
from uft_ds.sweep.table import Result, best_of, show_table

ONE_RECIPE = [{"name": "sw", "recipe": "toy.yaml"}]
GRID = {"train.lr": [2e-4, 1e-3], "objective.beta": [0.01, 0.1]}
METRICS = [
    "held_out/loss", "held_out/rank_correlation/score", "held_out/rank_correlation/pair", "held_out/pair_accuracy/pair",
    "held_out/calibration_error/instruction", "held_out/calibration_error/score",
]  # fmt: skip


def results_of(sweep: Sweep, *, status: str = "done", **values: list[float]) -> list[Result]:
    """Results whose metrics are some of METRICS, by `rank_correlation_score=[...]`, one value a run."""
    found = []
    for number, run in enumerate(sweep.runs):
        metrics = {name: 0.1 * place for place, name in enumerate(METRICS)}
        for key, given in values.items():
            name = next(name for name in METRICS if name.replace("/", "_") == f"held_out_{key}")
            metrics[name] = given[number]
        found.append(Result(run, status, metrics, 1.0))
    return found


def shown(sweep: Sweep, results: list[Result], width: int) -> str:
    text = io.StringIO()
    show_table(sweep, results, Console(file=text, width=width, markup=False, highlight=False))
    return text.getvalue()


@pytest.mark.parametrize("width", [40, 80, 110, 120, 200, 10_000])
def test_runs_are_told_apart_at_every_width(width: int) -> None:
    """By the grid's values in the first columns, under their short names; no cell is cut, no header stands for two."""
    sweep = sweep_of(grid=GRID, runs=ONE_RECIPE)
    text = shown(sweep, results_of(sweep, rank_correlation_score=[0.1, 0.2, 0.4, 0.3]), width)
    lines = text.splitlines()
    assert "…" not in text
    table = lines[: next(number for number, line in enumerate(lines) if ": " in line)]
    assert max(map(len, table)) <= width
    assert f"all metrics: {sweep.output}/table.csv; the runs: {sweep.output}/NAME" in lines, "a path is not broken"
    cells = [line.replace("*", "").split() for line in lines]
    rows = [row for row in cells if row[:1] in (["0.01"], ["0.1"])]
    assert [row[:2] for row in rows] == [["0.01", "0.0002"], ["0.01", "0.001"], ["0.1", "0.0002"], ["0.1", "0.001"]]
    assert len({tuple(row) for row in rows}) == 4
    header = next(line for line in lines if line.split()[:2] == ["beta", "lr"])
    above = "\n".join(lines[: lines.index(header)])
    assert above.count("held-out") >= (4 if width >= 80 else 1)
    named = next((line for line in lines if line.startswith("not shown at this width: ")), "")
    assert above.count("held-out") == len(METRICS) - named.count("held_out/")
    assert ("sw-beta=0.01-lr=0.0002" in text) is (width > 120)


def test_metrics_that_do_not_fit_are_named() -> None:
    """Twelve of them at 80 columns: the first ones are shown, each of the others is named, none is cut."""
    names = [f"held_out/loss/instruction/loss_number_{number}" for number in range(12)]
    sweep = sweep_of(grid=GRID, runs=ONE_RECIPE, columns=["held_out/*"])
    results = [Result(run, "done", dict.fromkeys(names, 0.25), 1.0) for run in sweep.runs]
    text = shown(sweep, results, 80)
    above = text[: text.index("0.0002")].replace("held-out", "*").count("*")
    assert 2 <= above == 12 - text.count("held_out/loss/instruction/loss_number_")
    assert "…" not in text


def test_a_column_of_nothing_is_left_out() -> None:
    """Of a metric that no run has a finite value of, such as a correlation of equal scores."""
    sweep = sweep_of(grid=GRID, runs=ONE_RECIPE)
    text = shown(sweep, results_of(sweep, rank_correlation_pair=[math.nan] * 4), 200)
    header = text[: text.index("0.0002")]
    assert header.split().count("correlation") == 1
    assert "nan" not in text
    some = shown(sweep, results_of(sweep, rank_correlation_pair=[math.nan, 0.5, 0.5, 0.5]), 200)
    assert some[: some.index("0.0002")].split().count("correlation") == 2
    assert "nan" not in some


def test_two_keys_that_end_alike_are_written_whole() -> None:
    """`rank` alone would say neither which of the two it is."""
    sweep = sweep_of(grid={"data.max_length": [64, 128], "lora.rank": [4, 8]}, runs=ONE_RECIPE)
    assert "max_length" in shown(sweep, results_of(sweep), 120)
    sweep = sweep_of(grid={"data.cache_dir": ["a"], "reference.cache_dir": ["b", "c"]}, runs=ONE_RECIPE)
    text = shown(sweep, results_of(sweep), 200)
    assert "data.cache_dir" in text
    assert "reference.cache_dir" in text


def test_how_a_run_ended_is_shown_only_where_one_is_not_done() -> None:
    """Otherwise it would be a column of `done`."""
    sweep = sweep_of(grid=GRID, runs=ONE_RECIPE)
    assert "status" not in shown(sweep, results_of(sweep), 110)
    long = "step 5, newest checkpoint step-000004: rank 1 was killed (signal 9): out of memory?"
    text = shown(sweep, results_of(sweep, status=long), 80)
    assert "status" in text
    assert "out of memory?" in " ".join(text.split())


def test_stages_are_told_by_their_names() -> None:
    """Without a grid too."""
    text = shown(sweep_of(grid=None), results_of(sweep_of(grid=None)), 80)
    assert [line.split()[0] for line in text.splitlines() if line.split()[:1] in (["sft"], ["una"], ["uft"])] == [
        "sft", "una", "uft",
    ]  # fmt: skip
    assert text.count("sft") == 1, "a name stands once"


@pytest.mark.parametrize(
    ("metric", "values", "best", "says"),
    [
        ("held_out/rank_correlation/score", [0.1, 0.2, 0.4, 0.3], [2], "highest held_out/rank_correlation/score, 0.4"),
        (
            "held_out/calibration_error/score",
            [0.3, 0.1, 0.1, 0.2],
            [1, 2],
            "lowest held_out/calibration_error/score, 0.1",
        ),
    ],
)
def test_the_best_is_marked_by_a_metric_that_compares(
    metric: str, values: list[float], best: list[int], says: str
) -> None:
    """The first one shown; not the loss, where betas differ: that is another loss. Ties are both best."""
    sweep = sweep_of(grid=GRID, runs=ONE_RECIPE)
    key = metric.removeprefix("held_out/").replace("/", "_")
    results = results_of(sweep, loss=[0.1, 0.2, 0.3, 0.4], **{key: values})
    found = best_of(sweep, results, ["held_out/loss", metric])
    assert found is not None
    assert found.runs == {sweep.runs[number].name for number in best}
    assert says in found.why
    assert "the first column that compares the runs; losses of different objectives are not compared" in found.why
    starred = [line for line in shown(sweep, results, 110).splitlines() if line.strip().startswith("*")]
    assert len(starred) == len(best) + 1, "the rows, and the line that says why"


def test_losses_compare_runs_of_one_objective() -> None:
    """A grid over lr alone; keep_best of all runs comes before the columns."""
    grid = {"train.lr": [1e-4, 1e-3]}
    sweep = sweep_of(grid=grid, runs=ONE_RECIPE)
    results = results_of(sweep, loss=[0.2, 0.1], rank_correlation_score=[0.5, 0.4])
    found = best_of(sweep, results, METRICS)
    assert found is not None
    assert found.runs == {"sw-lr=0.001"}
    assert "lowest held_out/loss, 0.1" in found.why
    held_out = [{"format": "jsonl", "path": "held.jsonl"}]
    chosen = {"train.keep_best": "held_out/rank_correlation/score", "data.held_out": held_out}
    sweep = sweep_of(grid=grid, runs=ONE_RECIPE, set=chosen)
    found = best_of(sweep, results_of(sweep, loss=[0.2, 0.1], rank_correlation_score=[0.5, 0.4]), METRICS)
    assert found is not None
    assert found.runs == {"sw-lr=0.0001"}
    assert "(train.keep_best)" in found.why


def test_what_cannot_be_compared_has_no_best() -> None:
    """Runs held out on different data; metrics that not all have; one run that is done."""
    files: list[Any] = [[{"format": "jsonl", "path": name}] for name in ("a.jsonl", "b.jsonl")]
    other = sweep_of(grid={"data.held_out": files}, runs=ONE_RECIPE)
    found = best_of(other, results_of(other, loss=[0.2, 0.1]), METRICS)
    assert found is not None
    assert not found.runs
    assert "held out on different data" in found.why
    sweep = sweep_of(grid=GRID, runs=ONE_RECIPE)
    none = best_of(sweep, results_of(sweep, rank_correlation_score=[math.nan, 1, 1, 1]), METRICS[:2])
    assert none is not None
    assert not none.runs
    assert none.why.startswith("no best is marked: no held-out metric compares all runs")
    assert best_of(sweep, results_of(sweep)[:1], METRICS) is None
