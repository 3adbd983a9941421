"""How far a run is and how it ended, as its folder tells; the exit code is for scripts."""

import errno
import fcntl
import json
from pathlib import Path

import pytest
from checkpoints import whole_checkpoint

from uft_ds.errors import EXIT_CHECK_FAILED, EXIT_CRASHED, EXIT_DONE, EXIT_STOPPED, UserError
from uft_ds.record.run_folder import RunFolder, Status
from uft_ds.run.progress import RunProgress, progress_of


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """Two steps, an evaluation behind them, and the checkpoint of the first."""
    folder = RunFolder(tmp_path)
    folder.lock.touch()
    lines = [{"step": 1, "grad_norm": 1.0}, {"step": 2, "grad_norm": 1.0}, {"step": 2, "held_out/loss": 0.5}]
    folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    whole_checkpoint(folder.checkpoints / "step-000001")
    return folder


@pytest.mark.parametrize("code", [EXIT_STOPPED, EXIT_CHECK_FAILED, EXIT_CRASHED])
def test_a_run_that_has_ended_says_why(run: RunFolder, code: int) -> None:
    """With the exit code that it left."""
    run.write_status(Status(code, "for a reason"))
    assert progress_of(run.path) == RunProgress(code, "step 2, newest checkpoint: step 1; for a reason")


def test_done_counts_whatever_else_is_said(run: RunFolder) -> None:
    """DONE is written last of all."""
    run.write_status(Status(EXIT_CRASHED, "an older one"))
    run.done.touch()
    assert progress_of(run.path) == RunProgress(EXIT_DONE, "step 2, newest checkpoint: step 1; done")


def test_a_run_without_a_word_was_killed_or_goes_on(run: RunFolder, tmp_path: Path) -> None:
    """Which of them, its lock tells; a run that has not made a step yet is one, too."""
    assert progress_of(run.path).summary.endswith("; ended without writing a status, as when it is killed")
    with run.lock.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert progress_of(run.path) == RunProgress(EXIT_CRASHED, "step 2, newest checkpoint: step 1; running")
    (tmp_path / "new").mkdir()
    new = RunFolder(tmp_path / "new")
    new.lock.touch()
    assert progress_of(new.path).summary.startswith("step 0, newest checkpoint: none; ")
    with pytest.raises(UserError, match="not the folder of a run"):
        progress_of(tmp_path / "nowhere")


def test_without_locks_it_is_not_said_to_go_on(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """How it ended is said where the run has left that; otherwise that nobody can know."""

    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert "running, or killed: its file system has no locks" in progress_of(run.path).summary
    run.write_status(Status(EXIT_STOPPED, "for a reason"))
    assert progress_of(run.path) == RunProgress(EXIT_STOPPED, "step 2, newest checkpoint: step 1; for a reason")


def test_damaged_metrics_are_no_end(run: RunFolder) -> None:
    """How far the run is comes from the lines that can be read; the first of the others is named."""
    with run.metrics.open("ab") as file:
        file.write(b'\xff\xff\nnull\n{"step": 3, "grad_norm": 1.0}\n')
    run.done.touch()
    found = progress_of(run.path)
    assert found.exit_code == EXIT_DONE
    place = f"({run.metrics}:4: damaged and not counted, 2 such lines)"
    assert found.summary == f"step 3, newest checkpoint: step 1 {place}; done"
