"""What is told of a run's end afterwards is what the terminal told."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from uft_ds.errors import EXIT_BAD_INPUT, EXIT_CRASHED, EXIT_DONE
from uft_ds.record.run_folder import RunFolder, Status
from uft_ds.run import launch as launching
from uft_ds.run.rank import _crash

TORCHRUN = "E1130 failed (exitcode: {code}) local_rank: {rank} (pid: 17) of binary: python\n"


class _Launcher:
    """torchrun after its ranks have ended: it has written its log, and rank 1 a status."""

    folder: RunFolder
    log: str
    status: Status | None
    returncode: int = 1

    def __init__(self, command: list[str], **_: Any) -> None:
        self.folder.launcher_log.write_text(self.log)
        if self.status is not None:
            self.folder.write_first_status(self.status)

    def wait(self, timeout: float) -> int:
        return self.returncode


def ended(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, log: str, status: Status | None, returncode: int = 1
) -> Status:
    monkeypatch.setattr(_Launcher, "returncode", returncode)
    monkeypatch.setattr(_Launcher, "folder", folder, raising=False)
    monkeypatch.setattr(_Launcher, "log", log, raising=False)
    monkeypatch.setattr(_Launcher, "status", status, raising=False)
    monkeypatch.setattr(launching.subprocess, "Popen", _Launcher)
    return launching.launch(folder, ranks=2, port=1)


def test_the_killed_rank_is_blamed_afterwards_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1, which saw its connection close, was faster to write."""
    folder = RunFolder(tmp_path)
    consequence = Status(EXIT_CRASHED, "rank 1 crashed: RuntimeError: Connection reset by peer")
    found = ended(folder, monkeypatch, TORCHRUN.format(code=-9, rank=0), consequence)
    assert found.message.startswith("rank 0 was killed (signal 9)")
    assert folder.read_status() == found


def test_ranks_that_say_nothing_leave_a_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And where one has said why, that stays."""
    folder = RunFolder(tmp_path)
    found = ended(folder, monkeypatch, "", None)
    assert "ended without a status" in found.message
    assert folder.read_status() == found
    reason = Status(EXIT_CRASHED, "rank 1 crashed: ValueError: x")
    folder.write_status(reason)
    assert ended(folder, monkeypatch, TORCHRUN.format(code=1, rank=1), None) == folder.read_status() == reason


def test_a_killed_launcher_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its ranks die with it and say nothing; where one has said why it ended before, that stays."""
    folder = RunFolder(tmp_path)
    found = ended(folder, monkeypatch, "", None, returncode=-9)
    assert found.message.startswith("the launcher, torchrun, was killed (signal 9)")
    assert (found.exit_code, folder.read_status()) == (EXIT_CRASHED, found)
    reason = Status(EXIT_CRASHED, "rank 1 crashed: ValueError: x")
    folder.write_status(reason)
    assert ended(folder, monkeypatch, "", None, returncode=-9) == reason


@pytest.mark.parametrize(("log", "returncode"), [(TORCHRUN.format(code=-9, rank=0), 1), ("", -9)])
def test_a_run_that_is_done_stays_done_whatever_is_killed_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: str, returncode: int
) -> None:
    """DONE is written once nothing is missing: a rank or torchrun that is killed then takes nothing back."""
    folder = RunFolder(tmp_path)
    folder.done.touch()
    found = ended(folder, monkeypatch, log, None, returncode)
    assert found == Status(EXIT_DONE, "done") == folder.read_status()


def test_a_disk_that_is_full_is_no_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 2, by the rank that met it, and by `uft train` where not even a status can be written."""
    monkeypatch.setenv("RANK", "0")
    full = _crash(OSError(errno.ENOSPC, "No space left on device"))
    assert full.exit_code == EXIT_BAD_INPUT
    assert full.message.endswith("No space left on device")
    gone = _crash(FileNotFoundError(errno.ENOENT, "No such file or directory", "run/metrics.jsonl"))
    assert gone == Status(EXIT_BAD_INPUT, "rank 0: run/metrics.jsonl: No such file or directory")
    folder = RunFolder(tmp_path)
    (tmp_path / "status.json").mkdir()
    found = ended(folder, monkeypatch, "", None)
    assert found.exit_code == EXIT_BAD_INPUT
    assert found.message.startswith(f"output: {tmp_path} cannot be written (Is a directory); the ranks ended without")


def test_a_lost_connection_blames_no_fault_of_this_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under torchrun alone nobody corrects it: the message itself says that another rank went first."""
    monkeypatch.setenv("RANK", "1")
    lost = _crash(RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:5"))
    assert lost.message.startswith("rank 1 lost its connection to another rank, which was killed or crashed")
    assert _crash(ValueError("x")).message == "rank 1 crashed: ValueError: x"
