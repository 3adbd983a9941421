"""A run's progress and outcome, read from its folder alone: for people, and for scripts that restart runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from uft_ds.checkpoint.folder import checkpoints_of, step_of
from uft_ds.errors import EXIT_CRASHED, EXIT_DONE, UserError
from uft_ds.record.metrics_file import damaged_metrics, read_metrics
from uft_ds.record.run_folder import RunFolder, is_owned


@dataclass(frozen=True)
class RunProgress:
    """exit_code: that of the run; 1 if it is still running, or ended without writing a status."""

    exit_code: int
    summary: str


def progress_of(run: Path) -> RunProgress:
    """Read a run's folder.

    Raises:
        UserError: it is not the folder of a run.
    """
    folder = RunFolder(run)
    if not folder.lock.exists():
        hint = "; `uft sweep ... --table` shows a sweep's runs" if (run / "table.csv").exists() else ""
        raise UserError(f"{run}: not the folder of a run{hint}")
    steps = [line["step"] for line in read_metrics(folder.metrics) if "grad_norm" in line]
    newest = next(iter(checkpoints_of(run)), None)
    where = f"step {max(steps, default=0)}, newest checkpoint: {_named(newest)}"
    damaged = damaged_metrics(folder.metrics)
    if damaged:
        where += f" ({folder.metrics}:{damaged[0]}: damaged and not counted, {len(damaged)} such lines)"
    status = folder.read_status()
    if folder.done.exists():
        return RunProgress(EXIT_DONE, f"{where}; done")
    owned = is_owned(folder)
    if owned:
        return RunProgress(EXIT_CRASHED, f"{where}; running")
    if status is None and owned is None:
        unknown = "running, or killed: its file system has no locks, so which of them is not known"
        return RunProgress(EXIT_CRASHED, f"{where}; {unknown}")
    if status is None:
        return RunProgress(EXIT_CRASHED, f"{where}; ended without writing a status, as when it is killed")
    return RunProgress(status.exit_code, f"{where}; {status.message}")


def _named(checkpoint: Path | None) -> str:
    if checkpoint is None:
        return "none"
    step = step_of(checkpoint)
    return f"step {step}" if step else "the start, before any step"
