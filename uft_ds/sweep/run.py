"""Run a sweep one run after the other, skip the runs that are done, and write one table of all results."""

from __future__ import annotations

import errno
import json
import math
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from uft_ds.checkpoint.folder import checkpoints_of
from uft_ds.errors import EXIT_INTERRUPTED, EXIT_STOPPED, UserError
from uft_ds.host.faults import ending
from uft_ds.host.files import write_atomically
from uft_ds.host.terminal import as_typed, visible
from uft_ds.recipe.file import dump_recipe, said
from uft_ds.recipe.settings import Settings
from uft_ds.recipe.to_settings import changed
from uft_ds.record.metrics_file import read_metrics
from uft_ds.record.run_folder import RunFolder, Status
from uft_ds.run.identity import may_change
from uft_ds.run.progress import progress_of
from uft_ds.run.resume import recipe_changes
from uft_ds.run.settings import adapter_folder, located
from uft_ds.streams.identity import adapter_identity
from uft_ds.sweep.file import PlannedRun, Sweep
from uft_ds.sweep.table import TABLE, Result, differing_values, show_table, write_table, writing


@dataclass(frozen=True)
class How:
    """How a run starts. overwrite: replace what its folder holds. resume: continue the run that its folder holds."""

    overwrite: bool
    resume: bool


def run_sweep(
    sweep: Sweep,
    console: Console,
    *,
    check: Callable[[Settings], object],
    train: Callable[[Settings, How], tuple[Path, Status]],
    overwrite: bool,
) -> list[Result]:
    """Run all runs that are not done; after a failure, only the runs that start from the failed one are skipped.

    Args:
        check: checks a run's settings and data before the first run starts.
        train: (settings, how) -> folder and status.
        overwrite: run everything again, done or not.
    Returns:
        One result per run, up to an interruption.
    Raises:
        UserError: a run's check failed, or a folder holds a run of another recipe; nothing has been run.
    """
    _check_runs(sweep, console, check, overwrite=overwrite)
    with writing(sweep.output / TABLE):  # before the first run trains
        sweep.output.mkdir(parents=True, exist_ok=True)
        if (sweep.output / TABLE).is_dir():
            raise IsADirectoryError(errno.EISDIR, "Is a directory")
        with tempfile.TemporaryFile(dir=sweep.output):
            pass
    values = differing_values(sweep)
    results: dict[str, Result] = {}
    unwritten: UserError | None = None
    try:
        for number, run in enumerate(sweep.runs, start=1):
            console.print(f"run {number} of {len(sweep.runs)}: {run.name}", style="bold")
            results[run.name] = _result(sweep, run, results, console, train, overwrite)
            try:
                write_table(sweep.output / TABLE, list(results.values()), values)
                unwritten = None
            except UserError as error:  # the runs are worth more than their table, which --table makes again
                unwritten = error
                print(f"warning: {visible(as_typed(str(error)))}", file=sys.stderr)
            if results[run.name].status in ("interrupted", "stopped"):
                break
    finally:
        if results:
            show_table(sweep, list(results.values()), console)
    if any(result.status in ("interrupted", "stopped") for result in results.values()):
        console.print("interrupted: finished work is kept, the same command continues from there")
    if unwritten is not None:
        raise unwritten
    return list(results.values())


def _result(
    sweep: Sweep,
    run: PlannedRun,
    results: dict[str, Result],
    console: Console,
    train: Callable[[Settings, How], tuple[Path, Status]],
    overwrite: bool,
) -> Result:
    folder = RunFolder(sweep.output / run.name)
    if run.after is not None and results[run.after].status != "done":
        console.print(f"skipped: {run.after} is not done")
        return Result(run, "skipped", {}, 0.0)
    is_kept = not overwrite and _goes_on(sweep, run, folder)
    if is_kept and folder.done.exists():
        console.print("done before")
        return _done(run, folder)
    try:
        _, status = train(run.settings, How(overwrite=not is_kept and folder.path.exists(), resume=is_kept))
    except KeyboardInterrupt:
        return Result(run, "interrupted", {}, 0.0)
    except UserError as error:
        print(f"error: {visible(as_typed(str(error)))}", file=sys.stderr)
        return Result(run, "failed", {}, 0.0)
    except Exception as error:  # noqa: BLE001 - one run failed; the others can still succeed
        print(f"error: {visible(as_typed(ending(error)[1]))}", file=sys.stderr)
        return Result(run, "failed", {}, 0.0)
    if status.exit_code != 0:
        ended = {EXIT_INTERRUPTED: "interrupted", EXIT_STOPPED: "stopped"}.get(status.exit_code, "failed")
        return Result(run, ended, {}, 0.0)
    return _done(run, folder)


def _how_far(folder: RunFolder) -> str:
    return progress_of(folder.path).summary if folder.lock.exists() else "not started"


def _done(run: PlannedRun, folder: RunFolder) -> Result:
    return Result(run, "done", last_values(folder), _training_seconds(folder))


def write_recipes(sweep: Sweep, folder: Path) -> list[Path]:
    """Write the recipes of a sweep for parallel jobs: one folder per point of the grid, with its stages in order.

    Returns:
        The folders, named by number.
    Raises:
        UserError: the folder holds other files, or cannot be written.
    """
    points: dict[str, list[PlannedRun]] = {}
    for run in sweep.runs:
        points.setdefault(repr(run.values), []).append(run)
    files = {
        folder / str(number) / f"{order}-{run.name}.yaml": run
        for number, stages in enumerate(points.values())
        for order, run in enumerate(stages)
    }
    folders = list(dict.fromkeys(path.parent for path in files))
    with writing(folder):
        found = [path for point in folders if point.exists() for path in point.iterdir()]
    other = next((path for path in found if path not in files), None)
    if other is not None:
        raise UserError(f"{other.parent}: holds other files than this sweep's recipes; give a new folder")
    for path, run in files.items():
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, dump_recipe(_for_a_job(run, sweep).stored))
    return folders


def _for_a_job(run: PlannedRun, sweep: Sweep) -> Settings:
    """Settings with absolute paths; the adapter that the run starts from need not exist yet."""
    settings = located(run.settings_alone)
    if run.after is None:
        return settings
    return changed(settings, {"reference.adapter": str((sweep.output / run.after).absolute())})


def table_of(sweep: Sweep, console: Console) -> list[Result]:
    """Write and show the table of all runs, including runs of other jobs; unfinished runs show their progress.

    Raises:
        UserError: a run's folder holds a run of another recipe.
    """
    results = []
    for run in sweep.runs:
        _check_folder(sweep, run)
        folder = RunFolder(sweep.output / run.name)
        results.append(
            _done(run, folder) if folder.done.exists() else Result(run, _how_far(folder), last_values(folder), 0.0)
        )
    write_table(sweep.output / TABLE, results, differing_values(sweep))
    show_table(sweep, results, console)
    return results


def _check_runs(sweep: Sweep, console: Console, check: Callable[[Settings], object], *, overwrite: bool) -> None:
    """Check all runs before the first one trains, so that an error in the last one is reported at once."""
    if not overwrite:
        for run in sweep.runs:
            _check_folder(sweep, run)
    ahead: list[PlannedRun] = []
    for run in sweep.runs:
        done = not overwrite and RunFolder(sweep.output / run.name).done.exists()
        is_stale = run.after in {other.name for other in ahead} or (done and not _starts_from_the_same(sweep, run))
        if not done or is_stale:
            ahead.append(run)
    for number, run in enumerate(ahead, start=1):
        console.print(f"checking run {number} of {len(ahead)}: {run.name}")
        try:
            check(run.settings_alone)
        except UserError as error:
            raise UserError("\n".join(f"run {run.name}: {line}" for line in str(error).splitlines())) from None


def _check_folder(sweep: Sweep, run: PlannedRun) -> None:
    """Refuse a run in the folder that has trained by another recipe than the run that is planned there, done or not.

    A run without a checkpoint has nothing to lose and is replaced. A second stage is trained anew with its first one.
    """
    folder = RunFolder(sweep.output / run.name)
    has_trained = folder.done.exists() or bool(checkpoints_of(folder.path))
    if not has_trained or (run.after is not None and not RunFolder(sweep.output / run.after).done.exists()):
        return
    changed = _first_change(folder, run)
    if changed is not None:
        raise UserError(
            f"{folder.path}: holds a run of another recipe ({changed}); run the sweep with --overwrite, or give "
            "another output"
        )


def _first_change(folder: RunFolder, run: PlannedRun) -> str | None:
    """The first key that makes a run another one than that of its folder, with both values, or None."""
    changes = recipe_changes(folder, located(run.settings))
    return next(
        (f"{key}: {said(now)} now, {said(then)} then" for key, (then, now) in changes.items() if not may_change(key)),
        None,
    )


def _goes_on(sweep: Sweep, run: PlannedRun, folder: RunFolder) -> bool:
    """Whether the folder holds this run, finished or not, so that it can be kept or resumed."""
    is_run = folder.lock.exists() and folder.recipe.exists() and folder.environment.exists()
    return is_run and _first_change(folder, run) is None and _starts_from_the_same(sweep, run)


def _starts_from_the_same(sweep: Sweep, run: PlannedRun) -> bool:
    """Whether a run started from the adapter that its previous run has now (true if it has none)."""
    if run.after is None:
        return True
    try:
        stored = json.loads(RunFolder(sweep.output / run.name).environment.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False  # damaged: what it started from is not known, so it is trained again
    if not isinstance(stored, dict):
        return False
    here = adapter_identity(adapter_folder(str(sweep.output / run.after)))
    return bool(stored.get("reference_adapter") == here)


def _training_seconds(folder: RunFolder) -> float:
    return float(sum(line.get("seconds") or 0.0 for line in read_metrics(folder.metrics)))


def last_values(folder: RunFolder) -> dict[str, float]:
    """Each metric's last value; NaN if it was not finite."""
    last: dict[str, float] = {}
    for line in read_metrics(folder.metrics):
        last |= {name: math.nan if value is None else value for name, value in line.items()}
    return last
