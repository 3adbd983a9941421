"""How far a run is and how it ended, by its folder alone: for people, and for scripts that start it again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from uft_ds.checkpoint.folder import checkpoints_of, step_of
from uft_ds.errors import EXIT_CRASHED, EXIT_DONE, UserError
from uft_ds.record.metrics import read_metrics
from uft_ds.record.run_folder import RunFolder, is_owned


@dataclass(frozen=True)
class RunProgress:
    """exit_code: the run's; 1 where it goes on, or died without a word."""

    exit_code: int
    summary: str


def progress_of(run: Path) -> RunProgress:
    """Read a run's folder.

    Raises:
        UserError: it is none.
    """
    folder = RunFolder(run)
    if not folder.lock.exists():
        hint = "; `uft sweep ... --table` shows a sweep's runs" if (run / "table.csv").exists() else ""
        raise UserError(f"{run}: no run's folder{hint}")
    steps = [line["step"] for line in read_metrics(folder.metrics) if "grad_norm" in line]
    newest = next(iter(checkpoints_of(run)), None)
    where = f"step {max(steps, default=0)}, newest checkpoint {'none' if newest is None else step_of(newest)}"
    status = folder.read_status()
    if folder.done.exists():
        return RunProgress(EXIT_DONE, f"{where}: done")
    owned = is_owned(folder)
    if owned:
        return RunProgress(EXIT_CRASHED, f"{where}: going on")
    if status is None and owned is None:
        unknown = "it is going on, or was killed: its file system has no locks, so that is not known"
        return RunProgress(EXIT_CRASHED, f"{where}: {unknown}")
    if status is None:
        return RunProgress(EXIT_CRASHED, f"{where}: it died without a word, as when it is killed")
    return RunProgress(status.exit_code, f"{where}: {status.message}")
