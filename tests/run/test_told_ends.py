"""What is told of a run's end afterwards is what the terminal told."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from uft_ds.errors import EXIT_BAD_INPUT, EXIT_CRASHED, EXIT_DONE
from uft_ds.record.run_folder import RunFolder, Status
from uft_ds.run.launch import launch
from uft_ds.run.order import Order
from uft_ds.run.rank import _crash


class _Ended:
    """Ranks that have ended, with these exit codes."""

    def __init__(self, codes: dict[int, int]) -> None:
        self._codes = codes

    def poll(self, seconds: float) -> dict[int, int]:
        return self._codes

    def ask_to_stop(self) -> None:
        raise AssertionError

    end = ask_to_stop


def ended(folder: RunFolder, codes: dict[int, int], status: Status | None) -> Status:
    """What is told of ranks that ended so, of which one has left a status."""

    def start(order: Order) -> _Ended:
        if status is not None:
            folder.write_first_status(status)
        return _Ended(codes)

    return launch(folder, start, ranks=2, port=1)


def test_the_killed_rank_is_blamed_afterwards_too(tmp_path: Path) -> None:
    """Rank 1, which saw its connection close, was faster to write."""
    folder = RunFolder(tmp_path)
    consequence = Status(EXIT_CRASHED, "rank 1 crashed: RuntimeError: Connection reset by peer")
    found = ended(folder, {0: -9, 1: 1}, consequence)
    assert found.message.startswith("rank 0 was killed (signal 9)")
    assert folder.read_status() == found


def test_ranks_that_say_nothing_leave_a_status(tmp_path: Path) -> None:
    """And where one has said why, that stays."""
    folder = RunFolder(tmp_path)
    found = ended(folder, {}, None)
    assert "ended without a status" in found.message
    assert folder.read_status() == found
    reason = Status(EXIT_CRASHED, "rank 1 crashed: ValueError: x")
    folder.write_status(reason)
    assert ended(folder, {1: 1}, None) == folder.read_status() == reason


class _Running(_Ended):
    """Ranks that run, while this process is asked to stop."""

    def __init__(self) -> None:
        super().__init__({})
        self.has_ended = False

    def poll(self, seconds: float) -> None:  # type: ignore[override]
        os.kill(os.getpid(), signal.SIGUSR1)

    def end(self) -> None:
        self.has_ended = True


def test_a_terminal_that_is_gone_leaves_no_ranks(tmp_path: Path) -> None:
    """An error ends the command, and the folder's lock with it: ranks that still run would write beside a new run."""
    ranks = _Running()

    def say(text: str) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        launch(RunFolder(tmp_path), lambda order: ranks, ranks=2, port=1, say=say)
    assert ranks.has_ended


@pytest.mark.parametrize("codes", [{0: -9, 1: 1}, {}])
def test_a_run_that_is_done_stays_done_whatever_is_killed_after_it(tmp_path: Path, codes: dict[int, int]) -> None:
    """DONE is written once nothing is missing: a rank, or what started it, that is killed then takes nothing back."""
    folder = RunFolder(tmp_path)
    folder.done.touch()
    assert ended(folder, codes, None) == Status(EXIT_DONE, "done") == folder.read_status()


def test_a_disk_that_takes_no_status_is_why_there_is_none(tmp_path: Path) -> None:
    """Exit code 2, as for a full disk anywhere: the ranks could not say it."""
    folder = RunFolder(tmp_path)
    (tmp_path / "status.json").mkdir()
    found = ended(folder, {0: 1}, None)
    assert found.exit_code == EXIT_BAD_INPUT
    assert found.message.startswith(f"output: {tmp_path} cannot be written (Is a directory); the ranks ended without")


def test_a_killed_server_is_told(tmp_path: Path) -> None:
    """The ranks die with the process that started them and leave no exit codes."""
    found = ended(RunFolder(tmp_path), {}, None)
    assert "as when the process that started them is killed" in found.message


def test_a_lost_connection_blames_no_fault_of_this_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under torchrun alone nobody corrects it: the message itself says that another rank went first."""
    monkeypatch.setenv("RANK", "1")
    lost = _crash(RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:5"))
    assert lost.message.startswith("rank 1 lost its connection to another rank, which was killed or crashed")
    assert _crash(ValueError("x")).message == "rank 1 crashed: ValueError: x"
    assert _crash(ValueError("a\nword " * 99)).message.endswith(" a word a word ..."), "one line, cut behind a word"
