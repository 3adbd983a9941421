"""`uft checkpoint`: list, verify and delete a run's checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from uft_ds.checkpoint.folder import (
    checkpoint_problem,
    checkpoints_of,
    is_named_by_step,
    point_latest,
    remove,
    set_aside_of,
    step_of,
)
from uft_ds.checkpoint.manifest import MANIFEST
from uft_ds.errors import UserError
from uft_ds.record.run_folder import RunFolder, locked


def listed(run: Path) -> Table:
    """A table with one row per checkpoint.

    Raises:
        UserError: there is no checkpoint.
    """
    table = Table("step", "MB", "ranks", "files", box=box.SIMPLE_HEAD)
    for checkpoint in _found(run):
        with suppress(FileNotFoundError):  # a running run may delete it in the meantime
            table.add_row(*_row(run, checkpoint))
    return table


def _row(run: Path, checkpoint: Path) -> tuple[str, str, str, Text]:
    size = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file()) / 1e6
    ranks = len(list(checkpoint.glob("optimizer/rank-*")))
    state = checkpoint_problem(checkpoint) or "as they were written"
    if checkpoint in set_aside_of(run):
        state = f"set aside as {checkpoint.name}: {state}"
    latest = " (latest)" if (run / "latest").exists() and (run / "latest").resolve() == checkpoint.resolve() else ""
    shown = str(step_of(checkpoint)) if is_named_by_step(checkpoint) else checkpoint.name
    return f"{shown}{latest}", f"{size:.1f}", str(ranks), Text(state)


def problems_of(run: Path) -> list[str]:
    """The problems of the files of a run's checkpoints; one line per damaged checkpoint.

    Raises:
        UserError: there is no checkpoint.
    """
    found = [(checkpoint, checkpoint_problem(checkpoint)) for checkpoint in _found(run)]
    # A running run may delete old checkpoints in the meantime.
    return [f"{path.name}: {problem}" for path, problem in found if problem is not None and path.exists()]


def delete(run: Path, steps: Sequence[int]) -> list[Path]:
    """Delete a run's checkpoints of these steps.

    Raises:
        UserError: a step has no checkpoint, or the run is, or may be, still running; nothing has been deleted.
    """
    folder = RunFolder(run)
    if not folder.lock.exists():
        raise UserError(f"{run}: not the folder of a run")
    unknown = "whether a run is still running is not known"
    remedy = f"if none is, delete the folders in {folder.checkpoints} yourself"
    with locked(folder, name=str(folder.path), without_locks=f"{unknown}; {remedy}"):
        # The later entry wins: a step that was set aside may have been written again since.
        there = {step_of(checkpoint): checkpoint for checkpoint in (*set_aside_of(run), *checkpoints_of(run))}
        missing = [step for step in steps if step not in there]
        if missing:
            known = ", ".join(map(str, there)) or "none"
            raise UserError(f"{run}: no checkpoint of step {missing[0]}; there are {known}")
        chosen = [there[step] for step in dict.fromkeys(steps)]
        try:
            for checkpoint in chosen:
                remove(checkpoint)
            point_latest(folder)
        except OSError as error:
            raise UserError(f"{error.filename or run}: cannot be deleted ({error.strerror or error})") from None
    return chosen


def _found(run: Path) -> list[Path]:
    if not run.is_dir():
        raise UserError(f"{run}: no such folder; expected a run's folder or one of its checkpoints")
    run = run.resolve()  # `latest` is a link
    found = [run] if (run / MANIFEST).exists() else [*checkpoints_of(run), *set_aside_of(run)]
    if not found:
        raise UserError(f"{run}: holds no checkpoint")
    return found
