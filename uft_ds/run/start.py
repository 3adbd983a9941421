"""Prepare and launch one run from the command line, and report how it ended."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn

from uft_ds.data.sources import PreparedData
from uft_ds.engine.deepspeed_file import with_deepspeed_file
from uft_ds.errors import EXIT_DONE, EXIT_STOPPED
from uft_ds.host.callbacks import OnProgress
from uft_ds.host.terminal import as_typed, visible
from uft_ds.recipe.settings import DataSettings, Settings
from uft_ds.record.report import SECONDS_BETWEEN_LINES
from uft_ds.record.run_folder import RunFolder, Status, check_ownable
from uft_ds.run.checks import check_sharding
from uft_ds.run.forked import RankServer
from uft_ds.run.launch import launch, master_port, number_of_ranks
from uft_ds.run.prepare import check_prepare, check_run, prepare_run
from uft_ds.run.preview import amount_line, device_notes, show_data, steps_line
from uft_ds.run.resume import Resumption, check_resume, nothing_to_do, prepare_resume
from uft_ds.run.room import check_room, core_notes
from uft_ds.run.settings import located
from uft_ds.run.torchrun import TorchrunRanks
from uft_ds.training.steps import steps_of


def run_settings(
    settings: Settings,
    what: str,
    console: Console,
    *,
    overwrite: bool = False,
    resume: bool = False,
    options: tuple[str, ...] = (),
    server: RankServer | None = None,
) -> tuple[Path, Status]:
    """Prepare the run, launch it and wait for its end.

    Args:
        server: forks the ranks; torchrun starts them if there is none, or it has died.
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
        console.print(_NOTHING_TO_RESUME.format(done.path))
        return done.path, Status(EXIT_DONE, "done")
    settings, ranks = _checked_launch(settings, console)
    with preparation(console) as on_progress:
        if resume:
            folder, data, lock = prepare_resume(settings, say=console.print, on_progress=on_progress)
        else:
            folder, data, lock = prepare_run(settings, overwrite=overwrite, on_progress=on_progress)
    with lock:
        _show(settings, data, console, typed)
        console.print(f"{what} on {ranks} ranks; logs in {folder.path}")
        start = TorchrunRanks if server is None or not server.is_alive else server.start
        status = launch(folder, start, ranks=ranks, port=master_port(), options=options, say=console.print)
    if status.exit_code == EXIT_STOPPED:
        console.print(status.message)
    elif status.exit_code != EXIT_DONE:
        print(f"error: {visible(as_typed(status.message))}", file=sys.stderr)
    return folder.path, status


@dataclass(frozen=True)
class Rehearsal:
    """What a run would do. settings: completed. done: the steps that a resume would keep."""

    settings: Settings
    ranks: int
    num_steps: int
    done: int


def rehearse(
    settings: Settings, console: Console, *, overwrite: bool = False, resume: bool = False
) -> Rehearsal | None:
    """Everything that `run_settings` does before it launches the ranks, without writing into the run's folder.

    Tokens of sources are written to their cache. What would be trained is printed.

    Returns:
        None if there is nothing to resume.
    Raises:
        UserError: a check failed.
    """
    typed, settings = settings.data, located(settings)
    if resume and (done := nothing_to_do(settings)) is not None:
        console.print(_NOTHING_TO_RESUME.format(done.path))
        return None
    settings, ranks = _checked_launch(settings, console)
    folder = RunFolder(settings.output)
    found: Resumption | None = None
    with preparation(console) as on_progress:
        check_ownable(folder)
        if resume and folder.lock.exists():
            found = check_resume(folder, settings, on_progress)
        if found is None:
            replaces = overwrite or (resume and folder.lock.exists())
            settings, data, *_ = check_prepare(settings, overwrite=replaces, on_progress=on_progress)
        else:
            settings, data = found.settings, found.data
    for note in () if found is None else found.notes:
        console.print(note)
    _show(settings, data, console, typed)
    steps_done, source = (0, {}) if found is None else (found.position.state.step, found.position.state.source)
    steps = steps_of(settings, data, source)
    if resume:
        begins = "at step 0: there is no checkpoint" if found is None else f"from {found.checkpoint.name}"
        console.print(f"would resume {begins}")
    console.print(steps_line(steps, settings.train.examples_per_step))
    console.print(amount_line(steps, data, steps_done))
    return Rehearsal(settings, ranks, len(steps), steps_done)


_NOTHING_TO_RESUME = (
    "{} is done: there is nothing to resume; for more steps give train.steps or train.epochs with --resume"
)


def _checked_launch(settings: Settings, console: Console) -> tuple[Settings, int]:
    """The settings with the DeepSpeed file's content, and the number of ranks, for which there are memory and a port.

    Raises:
        UserError: a check failed.
    """
    settings = with_deepspeed_file(settings)
    ranks = number_of_ranks(settings.launch.ranks)
    check_sharding(settings, ranks=ranks, ranks_per_node=ranks)
    check_room(settings, ranks=ranks, has_gpu=torch.cuda.is_available())
    for note in core_notes(ranks=ranks):
        console.print(note)
    master_port()  # called again at the launch: a given port that is in use is reported before the data is read
    return settings, ranks


def _show(settings: Settings, data: PreparedData, console: Console, typed: DataSettings) -> None:
    show_data(settings, data, console, typed=typed)
    for note in device_notes(settings, has_gpu=torch.cuda.is_available()):
        console.print(note)


def check_settings_and_data(settings: Settings, console: Console) -> None:
    """Check settings and data without a launch.

    Raises:
        UserError: a check failed. Nothing has been written, except tokenised sources in the cache.
    """
    with preparation(console) as on_progress:
        check_run(with_deepspeed_file(located(settings)), on_progress)


@contextmanager
def preparation(console: Console) -> Iterator[OnProgress]:
    """Show a progress bar for each slow operation; if the output is no terminal, a line every few seconds."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=20), TaskProgressColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        tasks: dict[str, TaskID] = {}
        last_line = time.monotonic()

        def on_progress(label: str, done: int, total: int) -> None:
            nonlocal last_line
            if not console.is_terminal and time.monotonic() - last_line >= SECONDS_BETWEEN_LINES:
                last_line = time.monotonic()
                console.print(f"{label}: {done / max(1, total):.0%}")
            if label not in tasks:
                tasks[label] = progress.add_task(label, total=total)
            progress.update(tasks[label], completed=done)

        yield on_progress
