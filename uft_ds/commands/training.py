"""`uft train`, `sweep`, `reference` and `quickstart` start ranks; `uft status` shows the progress of a run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from uft_ds.commands.shared import Overrides, RecipeName, console, settings_given
from uft_ds.errors import EXIT_INTERRUPTED, EXIT_STOPPED, CheckFailed, UserError

if TYPE_CHECKING:
    from uft_ds.recipe.settings import Settings
    from uft_ds.record.run_folder import Status
    from uft_ds.sweep.run import Result


def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume from the newest intact checkpoint of the run in the output folder.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete the run that the output holds.")] = False,
    replay: Annotated[
        Optional[Path],  # noqa: UP045 - typer reads it
        typer.Option(help="Generate nothing: train on the answers and scores that this online run has recorded."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and say what would be trained, but launch nothing.")
    ] = False,
) -> None:
    """Check everything, then train on this machine's GPUs, or on two CPU processes."""
    if resume and overwrite:
        raise UserError("--resume and --overwrite: the one continues a run, the other deletes it; give one of them")
    settings = settings_given(recipe, [*(overrides or ()), *_replaying(replay)])
    if dry_run:
        _rehearse(settings, overwrite=overwrite, resume=resume)
        return
    from uft_ds.run.forked import rank_server  # seconds of imports, after what is wrong in the recipe has been told

    with rank_server() as server:
        _train(settings, server=server, overwrite=overwrite, resume=resume)


def _replaying(run: Path | None) -> list[str]:
    """The overrides by which a recipe trains on the record of a run."""
    if run is None:
        return []
    of_server = [f"generator.{key}=null" for key in ("url", "served_model", "key_env")]
    as_yaml = json.dumps(str(run))  # quoted: a folder may have a name that is a number in YAML
    return ["generator.by=recorded", f"generator.run={as_yaml}", *of_server]


def _rehearse(settings: Settings, *, overwrite: bool, resume: bool) -> None:
    from uft_ds.planning.here import memory_note
    from uft_ds.run.start import rehearse

    found = rehearse(settings, console, overwrite=overwrite, resume=resume)
    if found is None:
        return
    console.print(memory_note(found.settings, found.ranks))
    console.print(f"dry run: {found.ranks} ranks would start, every check has passed; {settings.output} is unchanged")


def _train(settings: Settings, **how: Any) -> None:
    """Prepare and launch a run and print its verdict; unless it is done, end the process with the run's exit code."""
    from uft_ds.record.metrics_file import read_metrics
    from uft_ds.record.run_folder import RunFolder
    from uft_ds.record.telemetry import read_rows
    from uft_ds.record.verdict import in_words, verdicts

    folder, _ = _launched(settings, "training", **how)
    run = RunFolder(folder)
    for line in in_words(verdicts(read_metrics(run.metrics), read_rows(run.held_out_rows))):
        console.print(line)
    console.print(f"done: {folder}  (report.html, metrics.jsonl, curves.png, checkpoints/)")


def _launched(settings: Settings, what: str, **how: Any) -> tuple[Path, Status]:
    from uft_ds.run.start import run_settings

    folder, status = run_settings(settings, what, console, **how)
    if status.exit_code != 0:
        raise typer.Exit(status.exit_code)
    return folder, status


def status(run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")]) -> None:
    """Show a run's progress and outcome. The exit code is the run's; 1 if it is running or ended without a status."""
    from uft_ds.run.progress import progress_of

    found = progress_of(run)
    console.print(found.summary)
    raise typer.Exit(found.exit_code)


def sweep(
    what: Annotated[str, typer.Argument(metavar="SWEEP", help="A sweep's YAML file; with --grid, a recipe.")],
    overrides: Overrides = None,
    grid: Annotated[
        Optional[list[str]],  # noqa: UP045 - typer reads it
        typer.Option("--grid", help="key=[value, ...]: run the recipe with each value, or combination of values."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Run again what is done.")] = False,
    recipes: Annotated[
        Optional[Path],  # noqa: UP045 - typer reads it
        typer.Option(help="Run nothing: write each run's recipe below this folder, for jobs of a cluster."),
    ] = None,
    table: Annotated[bool, typer.Option("--table", help="Run nothing: the table of what is done.")] = False,
) -> None:
    """Run recipes one after the other, and compare them in one table.

    Overrides hold for every run. Finished runs are not repeated and a stopped run is resumed, so the same command
    continues after an interruption. Tokenised data and reference log-probs are shared through their caches.
    """
    from uft_ds.run.forked import rank_server
    from uft_ds.run.start import check_settings_and_data, run_settings
    from uft_ds.sweep.file import grid_of, load_sweep
    from uft_ds.sweep.run import run_sweep, table_of, write_recipes

    given = tuple(overrides or ())
    planned = grid_of(what, grid, given) if grid else load_sweep(what, given)
    if (recipes is not None) + table + overwrite > 1:
        raise UserError("--recipes, --table, --overwrite: give one of them")
    if recipes is not None:
        for folder in write_recipes(planned, recipes):
            print(folder)
        return
    if table:
        _fail_unless_all_done(table_of(planned, console))
        return
    with rank_server() as server:
        results = run_sweep(
            planned,
            console,
            check=lambda settings: check_settings_and_data(settings, console),
            train=lambda settings, how: run_settings(
                settings, "training", console, overwrite=how.overwrite, resume=how.resume, server=server
            ),
            overwrite=overwrite,
        )
    for status, code in (("interrupted", EXIT_INTERRUPTED), ("stopped", EXIT_STOPPED)):
        if any(result.status == status for result in results):
            raise typer.Exit(code)
    _fail_unless_all_done(results)


def _fail_unless_all_done(results: list[Result]) -> None:
    failed = [result.run.name for result in results if result.status != "done"]
    if failed:
        raise CheckFailed(f"{len(failed)} of {len(results)} runs are not done: {', '.join(failed)}")


def reference(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Compute the reference log-probs of a recipe's data in advance, for all runs that share them.

    Stored values are not computed again, so a fill that was stopped continues where it was. The recipe's output is
    not touched.
    """
    import shutil
    import tempfile

    settings = settings_given(recipe, overrides)
    from uft_ds.recipe.to_settings import changed
    from uft_ds.run.forked import rank_server

    if not settings.reference.caches:
        why = "reference.cache is false"
        if settings.is_online:
            why = "answers of the policy come once, so an online run has no cache"
        elif settings.reference.given_cache:
            why = "objective.loss needs no reference"
        raise UserError(f"there is nothing to fill: {why}")
    work = Path(tempfile.mkdtemp(prefix="uft-reference-"))
    # The reference is the base whatever the policy starts from.
    alone: dict[str, Any] = {
        "output": str(work / "run"),
        "start.adapter": None,
        "evaluate.tasks": [],
        "train.keep_best": None,
    }
    filling = changed(settings, alone)
    try:
        with rank_server() as server:
            _, status = _launched(filling, "computing the reference", options=("--only-reference",), server=server)
    except typer.Exit as end:
        if end.exit_code in (EXIT_INTERRUPTED, EXIT_STOPPED):
            print("stored values are kept: the same command continues from there", file=sys.stderr)
            shutil.rmtree(work)
        else:  # the ranks failed: keep their logs
            shutil.rmtree(work / "run" / "data", ignore_errors=True)
        raise
    except BaseException:
        shutil.rmtree(work)
        raise
    shutil.rmtree(work)
    console.print(f"done: {status.message}")


def quickstart(
    overrides: Overrides = None,
    folder: Annotated[Path, typer.Option(help="Where everything is written.")] = Path("runs"),
    online: Annotated[
        bool, typer.Option("--online", help="After a short start, train on the model's own answers, graded by code.")
    ] = False,
) -> None:
    """Train a small real model from the package index on verifiable tasks; about ten minutes on two cores."""
    from functools import partial

    settings_given("quickstart_online" if online else "quickstart", overrides)  # a slip is told before long imports
    from uft_ds.examples.quickstart import run_online, run_quickstart
    from uft_ds.run.forked import rank_server

    run = run_online if online else run_quickstart
    with rank_server() as server:  # before the model answers: a process that has computed must not be forked
        run(folder, tuple(overrides or ()), console=console, train=partial(_train, server=server))
