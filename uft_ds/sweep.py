"""Running a sweep: one run after the other, what is done is not done again, and one table of all."""

from __future__ import annotations

import csv
import fnmatch
import io
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from uft_ds.errors import EXIT_INTERRUPTED, UserError
from uft_ds.files import write_atomically
from uft_ds.recipe import Recipe
from uft_ds.recipe_file import load_recipe
from uft_ds.resolve import with_absolute_paths
from uft_ds.sweep_file import PlannedRun, Sweep, recipe_of
from uft_ds.training.metrics import read_metrics
from uft_ds.training.run_folder import RunFolder, Status

TABLE = "table.csv"


@dataclass(frozen=True)
class Result:
    """status: done, failed, or skipped because the run before is not done. metrics: the last value of each."""

    run: PlannedRun
    status: str
    metrics: dict[str, float]
    seconds: float


def run_sweep(
    sweep: Sweep, console: Console, *, train: Callable[[Recipe, bool], tuple[Path, Status]], overwrite: bool
) -> list[Result]:
    """Run what is not done yet; a run that fails stops those that start from it, and no others.

    Args:
        train: (recipe, overwrite) -> folder and status.
        overwrite: run again what is done or did not finish.
    Raises:
        UserError: a folder holds a run of another recipe.
    """
    for run in sweep.runs:
        if not overwrite:
            _check_folder(sweep, run)
    results: dict[str, Result] = {}
    try:
        for number, run in enumerate(sweep.runs, start=1):
            console.print(f"run {number} of {len(sweep.runs)}: {run.name}", style="bold")
            results[run.name] = _result(sweep, run, results, console, train, overwrite)
            write_table(sweep, list(results.values()))
            if results[run.name].status == "interrupted":
                break
    finally:
        if results:
            console.print(shown_table(sweep, list(results.values())))
            console.print(f"all metrics: {sweep.output / TABLE}")
    return list(results.values())


def _result(
    sweep: Sweep,
    run: PlannedRun,
    results: dict[str, Result],
    console: Console,
    train: Callable[[Recipe, bool], tuple[Path, Status]],
    overwrite: bool,
) -> Result:
    folder = RunFolder(sweep.output / run.name)
    if run.after is not None and results[run.after].status != "done":
        console.print(f"skipped: {run.after} is not done")
        return Result(run, "skipped", {}, 0.0)
    started = time.monotonic()
    if overwrite or not folder.done.exists():
        try:
            _, status = train(recipe_of(sweep, run), overwrite or folder.path.exists())
        except UserError as error:
            console.print(f"error: {error}", soft_wrap=True)
            return Result(run, "failed", {}, time.monotonic() - started)
        if status.exit_code != 0:
            ended = "interrupted" if status.exit_code == EXIT_INTERRUPTED else "failed"
            return Result(run, ended, {}, time.monotonic() - started)
    else:
        console.print("done before")
    return Result(run, "done", last_values(folder), time.monotonic() - started)


def _check_folder(sweep: Sweep, run: PlannedRun) -> None:
    """What is done counts only if it is what would be run."""
    folder = RunFolder(sweep.output / run.name)
    if not folder.done.exists():
        return
    recipe = recipe_of(sweep, run)
    if run.after is not None and not (sweep.output / run.after).exists():
        return  # the run that it starts from is made anew, and then its adapter is another one
    before, now = load_recipe(str(folder.recipe)), with_absolute_paths(recipe)
    changed = [key for key, value in _leaves(now).items() if _leaves(before).get(key) != value]
    if recipe.model.revision is None and "model.revision" in changed:
        changed.remove("model.revision")  # preparing a run fixes a hub model's
    if changed:
        raise UserError(
            f"{folder.path}: holds a run of another recipe ({changed[0]}: {_leaves(now)[changed[0]]} now, "
            f"{_leaves(before).get(changed[0])} then); run the sweep with --overwrite, or give another output"
        )


def _leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    """Every leaf of a recipe by its key."""
    tree = value.model_dump(mode="json") if isinstance(value, Recipe) else value
    if not isinstance(tree, dict | list):
        return {prefix.removesuffix("."): tree}
    items = enumerate(tree) if isinstance(tree, list) else tree.items()
    leaves = {prefix.removesuffix("."): len(tree)} if isinstance(tree, list) else {}
    for key, inner in items:
        leaves |= _leaves(inner, f"{prefix}{key}.")
    return leaves


def last_values(folder: RunFolder) -> dict[str, float]:
    """Each metric's last value."""
    last: dict[str, float] = {}
    for line in read_metrics(folder.metrics):
        last |= {name: value for name, value in line.items() if value is not None}
    return last


def write_table(sweep: Sweep, results: list[Result]) -> None:
    """One row a run: the grid's values, how it ended, and every metric."""
    keys = [key for key, _ in sweep.runs[0].values]
    names = sorted({name for result in results for name in result.metrics})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", "stage", *keys, "status", "seconds", *names])
    for result in results:
        values = dict(result.run.values)
        metrics = [f"{result.metrics[name]:.6g}" if name in result.metrics else "" for name in names]
        row = [result.run.name, result.run.stage, *(values[key] for key in keys), result.status]
        writer.writerow([*row, f"{result.seconds:.0f}", *metrics])
    sweep.output.mkdir(parents=True, exist_ok=True)
    write_atomically(sweep.output / TABLE, text.getvalue())


def shown_table(sweep: Sweep, results: list[Result]) -> Table:
    """The chosen metrics, for the terminal."""
    found = sorted({name for result in results for name in result.metrics})
    names = list(dict.fromkeys(name for pattern in sweep.columns for name in fnmatch.filter(found, pattern)))
    names = names or [name for name in ("loss",) if name in found]
    table = Table("run", "status", *names, box=box.SIMPLE_HEAD, title=sweep.name, title_justify="left")
    for result in results:
        metrics = [f"{result.metrics[name]:.4g}" if name in result.metrics else "" for name in names]
        table.add_row(Text(result.run.name), result.status, *metrics)
    return table
