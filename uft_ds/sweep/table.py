"""The results of a sweep: a CSV file of everything, and a table for the terminal with the best run marked."""

from __future__ import annotations

import csv
import fnmatch
import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from uft_ds.errors import UserError
from uft_ds.host.files import write_atomically
from uft_ds.recipe.best import BEST, badness, is_of_task
from uft_ds.recipe.file import leaves_of
from uft_ds.sweep.file import DEFAULT_COLUMNS, PlannedRun, Sweep

TABLE = "table.csv"


@dataclass(frozen=True)
class Result:
    """The outcome of one run.

    status: done, failed, stopped (and saved), interrupted, or skipped because the previous run is not done.
    metrics: the last value of each metric. seconds: duration of all its steps.
    """

    run: PlannedRun
    status: str
    metrics: dict[str, float]
    seconds: float


@dataclass(frozen=True)
class Best:
    """The best runs of a sweep by one metric. why: for the user, with what could not be compared."""

    runs: frozenset[str]
    why: str


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within the block, an error of the system is one of the user's, who gave the folder: names the path."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); give another folder") from None


def differing_values(sweep: Sweep) -> dict[str, dict[str, Any]]:
    """Values of the keys in which the recipes differ, by run and key: the grid's keys first, without data and names."""
    recipes = {run.name: leaves_of(run.settings_alone.stored) for run in sweep.runs}
    grid = [key for key, _ in sweep.runs[0].values]
    keys = dict.fromkeys(key for leaves in recipes.values() for key in leaves)
    ignored = ("name", "output", "data", *grid)  # a map of the grid is one column
    kept = [key for key in keys if not any(key == other or key.startswith(f"{other}.") for other in ignored)]
    differing = [key for key in kept if len({repr(leaves.get(key, "")) for leaves in recipes.values()}) > 1]
    return {
        run.name: {**dict(run.values), **{key: recipes[run.name].get(key, "") for key in differing}}
        for run in sweep.runs
    }


def write_table(path: Path, results: list[Result], settings: dict[str, dict[str, Any]]) -> None:
    """Write the CSV file: one row per run with its differing settings, its status and every metric.

    Column `seconds`: training steps only, without evaluation and start.

    Args:
        settings: values by run and key; all runs have the same keys.
    """
    keys = list(settings[results[0].run.name])
    names = sorted({name for result in results for name in result.metrics} - {"step", "seconds"})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", "stage", *keys, "status", "seconds", *names])
    for result in results:
        values = settings[result.run.name]
        metrics = [f"{result.metrics[name]:.6g}" if name in result.metrics else "" for name in names]
        row = [result.run.name, result.run.stage, *(values[key] for key in keys), result.status]
        writer.writerow([*row, f"{result.seconds:.0f}", *metrics])
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text.getvalue())


def show_table(sweep: Sweep, results: list[Result], console: Console) -> None:
    """Print what varies, the sweep's `columns` as far as they fit, the best run, and where all metrics are."""
    names = _shown_metrics(sweep, results)
    best = best_of(sweep, results, names)
    shown, fitting = None, len(names)
    for fitting in range(len(names), 0, -1):
        shown = _table(sweep, results, names[:fitting], best)
        if _widths(shown, console).minimum <= console.width:
            break
    with_names = _table(sweep, results, names[:fitting], best, with_names=True)
    if shown is None or _widths(with_names, console).maximum <= console.width:
        shown = with_names
    console.print(shown)
    if fitting < len(names):
        console.print(f"not shown at this width: {', '.join(names[fitting:])}", soft_wrap=True)
    if best is not None:
        console.print(best.why, soft_wrap=True)
    if sweep.columns != DEFAULT_COLUMNS:
        found = {name for result in results for name in result.metrics}
        for pattern in sweep.columns:
            if found and not fnmatch.filter(found, pattern):
                console.print(f"note: columns: no run has a metric {pattern!r}", soft_wrap=True)
    console.print(f"all metrics: {sweep.output / TABLE}; the runs: {sweep.output}/NAME", soft_wrap=True)


def _shown_metrics(sweep: Sweep, results: list[Result]) -> list[str]:
    """The metrics of the sweep's `columns` that some run has a finite value of."""
    found = sorted({name for result in results for name, value in result.metrics.items() if math.isfinite(value)})
    names = list(dict.fromkeys(name for pattern in sweep.columns for name in fnmatch.filter(found, pattern)))
    return names or [name for name in ("loss",) if name in found]


def best_of(sweep: Sweep, results: list[Result], names: Sequence[str]) -> Best | None:
    """The best of the runs that are done, by the runs' own `train.keep_best` or the first metric that compares them.

    None for a single run. Runs that are held out on different data have no best, and a loss compares only runs whose
    objectives are the same.

    Args:
        names: metrics, the most important first.
    """
    done = [result for result in results if result.status == "done"]
    if len(done) < 2:
        return None
    trees = [result.run.settings_alone.stored for result in done]
    if any(tree["data"]["held_out"] != trees[0]["data"]["held_out"] for tree in trees):
        return Best(frozenset(), "no best is marked: the runs are held out on different data")
    kept = {tree["train"]["keep_best"] for tree in trees}
    same_tasks = all(tree["evaluate"] == trees[0]["evaluate"] for tree in trees)
    same_objective = all(tree["objective"] == trees[0]["objective"] for tree in trees)
    candidates = [*(kept if len(kept) == 1 and None not in kept else ()), *names]
    passed_over = ""
    for name in candidates:
        prefix, _, rest = name.partition("/")
        base = rest.partition("/")[0]
        if not (same_tasks if is_of_task(name) else prefix == "held_out" and base in BEST):
            continue
        if base == "loss" and not same_objective:
            passed_over = "; losses of different objectives are not compared"
            continue
        values = {one.run.name: one.metrics.get(name, math.nan) for one in done}
        if not all(map(math.isfinite, values.values())):
            continue
        least = min(badness(name, value) for value in values.values())
        best = [run for run, value in values.items() if badness(name, value) == least]
        if len(best) == len(done):
            continue
        why = "train.keep_best" if kept == {name} else "the first column that compares the runs"
        is_best = f"{'highest' if is_of_task(name) else BEST[base]} {name}, {values[best[0]]:.4g}"
        return Best(frozenset(best), f"* best: {', '.join(best)}: {is_best} ({why}{passed_over})")
    return Best(frozenset(), f"no best is marked: no held-out metric compares all runs that are done{passed_over}")


def _table(
    sweep: Sweep, results: list[Result], names: Sequence[str], best: Best | None, *, with_names: bool = False
) -> Table:
    """What tells the runs apart comes first: the grid's values, the stage; how a run ended only if one is not done."""
    keys = [key for key, _ in sweep.runs[0].values]
    by_stage = len({run.stage for run in sweep.runs}) > 1 or not keys
    is_done = all(result.status == "done" for result in results)
    table = Table(box=box.SIMPLE_HEAD, title=sweep.name, title_justify="left", pad_edge=False)
    table.add_column("")
    if by_stage:
        table.add_column("run", overflow="fold")
    for leaf in _leaves(keys):
        table.add_column(leaf, overflow="fold")
    if not is_done:
        table.add_column("status", overflow="fold", max_width=30)
    for name in names:
        table.add_column(_header(name), justify="right", no_wrap=True)
    with_names = with_names and bool(keys)
    if with_names:
        table.add_column("folder", no_wrap=True)
    for result in results:
        values = dict(result.run.values)
        cells = ["*" if best is not None and result.run.name in best.runs else ""]
        cells += [result.run.stage] if by_stage else []
        cells += [str(values[key]) for key in keys]
        cells += [] if is_done else [result.status]
        cells += [_number(result.metrics.get(name, math.nan)) for name in names]
        table.add_row(*map(Text, cells), *([Text(result.run.name)] if with_names else []))
    return table


def _leaves(keys: Sequence[str]) -> list[str]:
    """Each key's last part, or all of it where two keys end alike."""
    last = [key.rpartition(".")[2] for key in keys]
    return [leaf if last.count(leaf) == 1 else key for leaf, key in zip(last, keys, strict=True)]


def _header(name: str) -> str:
    """A metric's name in short lines: `held_out/rank_correlation/score` in four."""
    prefix, _, rest = name.partition("/")
    parts = {"held_out": ("held-out", rest), "tasks": ("task", rest)}
    part, rest = parts.get(prefix, ("training", name))
    return "\n".join([part, *rest.replace("/", "_").split("_")])


def _number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else ""


def _widths(table: Table, console: Console) -> Measurement:
    """Columns of the terminal that the table takes: at least, with text folded, and without folding."""
    return Measurement.get(console, console.options.update(width=10_000), table)
