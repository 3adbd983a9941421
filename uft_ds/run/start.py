"""Prepare and launch one run from the command line, and report how it ended."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn

from uft_ds.errors import EXIT_DONE, EXIT_STOPPED
from uft_ds.host.callbacks import OnProgress
from uft_ds.recipe.settings import Settings
from uft_ds.record.run_folder import Status
from uft_ds.run.checks import check_sharding
from uft_ds.run.launch import launch, master_port, number_of_ranks
from uft_ds.run.prepare import check_run, prepare_run
from uft_ds.run.preview import device_notes, show_data
from uft_ds.run.resume import nothing_to_do, prepare_resume
from uft_ds.run.settings import located, with_deepspeed_file


def run_settings(
    settings: Settings,
    what: str,
    console: Console,
    *,
    overwrite: bool = False,
    resume: bool = False,
    options: tuple[str, ...] = (),
) -> tuple[Path, Status]:
    """Prepare the run, launch it and wait for its end.

    Args:
        what: name of the work, shown to the user, such as "training".
        overwrite: delete the run that the output holds. resume: resume it, unless it is done.
        options: extra command-line options of the ranks' program.
    Returns:
        The run's folder, and how the run ended.
    Raises:
        UserError: a check failed; nothing has been launched.
    """
    typed, settings = settings.data, located(settings)
    if resume and (done := nothing_to_do(settings)) is not None:
        console.print(f"{done.path} is done: there is nothing to resume")
        return done.path, Status(EXIT_DONE, "done")
    settings = with_deepspeed_file(settings)
    ranks = number_of_ranks(settings.launch.ranks)
    check_sharding(settings, ranks=ranks, ranks_per_node=ranks)
    master_port()  # called twice: a given port that is in use is reported before the data is read
    with preparation(console) as on_progress:
        if resume:
            folder, data, lock = prepare_resume(settings, say=console.print, on_progress=on_progress)
        else:
            folder, data, lock = prepare_run(settings, overwrite=overwrite, on_progress=on_progress)
    with lock:
        show_data(settings, data, console, typed=typed)
        for note in device_notes(settings, has_gpu=torch.cuda.is_available()):
            console.print(note)
        console.print(f"{what} on {ranks} ranks; logs in {folder.path}")
        status = launch(folder, ranks=ranks, port=master_port(), options=options, say=console.print)
    if status.exit_code == EXIT_STOPPED:
        console.print(status.message)
    elif status.exit_code != EXIT_DONE:
        print(f"error: {status.message}", file=sys.stderr)
    return folder.path, status


def check_settings_and_data(settings: Settings, console: Console) -> None:
    """Check settings and data without a launch.

    Raises:
        UserError: a check failed. Nothing has been written, except tokenised sources in the cache.
    """
    with preparation(console) as on_progress:
        check_run(with_deepspeed_file(located(settings)), on_progress)


@contextmanager
def preparation(console: Console) -> Iterator[OnProgress]:
    """Show a progress bar for each slow operation, if the output is a terminal."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=20), TaskProgressColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        tasks: dict[str, TaskID] = {}

        def on_progress(label: str, done: int, total: int) -> None:
            if label not in tasks:
                tasks[label] = progress.add_task(label, total=total)
            progress.update(tasks[label], completed=done)

        yield on_progress
