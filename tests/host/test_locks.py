"""Locks between processes: held, free, not there at all, and never a way to another file."""

import errno
import fcntl
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from uft_ds.host.locks import Held, NoLocks, acquire, is_held

HOLD = """
import sys
from pathlib import Path
from uft_ds.host.locks import acquire
lock = acquire(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_a_lock_is_held_until_its_process_ends(tmp_path: Path) -> None:
    """Another process is refused meanwhile, and sees that it is held; once the holder is killed the lock is free."""
    path = tmp_path / "lock"
    command = [sys.executable, "-c", HOLD, str(path)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert is_held(path)
        with pytest.raises(Held):
            acquire(path)
    finally:
        holder.kill()
        holder.communicate(timeout=10)
    assert not is_held(path)
    acquire(path).close()


@pytest.mark.parametrize("wait_seconds", [None, 30.0])
def test_whoever_waits_gets_it_next(tmp_path: Path, wait_seconds: float | None) -> None:
    """As soon as the holder closes it; one who waits for a limited time is refused after that."""
    path = tmp_path / "lock"
    first = acquire(path)
    with pytest.raises(Held):
        acquire(path, wait_seconds=0.1)
    closing = threading.Timer(0.3, first.close)
    started = time.monotonic()
    closing.start()
    with acquire(path, wait_seconds=wait_seconds):
        assert 0.2 < time.monotonic() - started < 20
    closing.join()


def test_who_waited_for_a_deleted_lock_does_not_share_the_next_one(tmp_path: Path) -> None:
    """A lock on a file that is deleted keeps nobody out: the waiting process locks the file of that name instead."""
    path = tmp_path / "lock"
    first = acquire(path)
    deleting = threading.Timer(0.3, first.delete)
    deleting.start()
    with acquire(path, wait_seconds=30.0) as second:
        assert first.closed
        assert path.exists()
        assert is_held(path), "the new file, and not the deleted one, is locked"
        with pytest.raises(Held):
            acquire(path)
    deleting.join()
    assert second.closed


@pytest.mark.parametrize("target", ["precious", "nothing"])
def test_a_link_is_never_followed(tmp_path: Path, target: str) -> None:
    """What it leads to is neither emptied nor created, by a lock or by a look."""
    (tmp_path / "precious").write_text("mine")
    path = tmp_path / "lock"
    path.symlink_to(tmp_path / target)
    with pytest.raises(OSError, match="lock is a link") as refused:
        acquire(path)
    assert refused.value.errno == errno.ELOOP
    with pytest.raises(OSError, match="lock is a link"):
        is_held(path)
    assert (tmp_path / "precious").read_text() == "mine"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["lock", "precious"]


def test_what_a_lock_file_holds_stays(tmp_path: Path) -> None:
    """A file of another program's that has the name keeps its content; a folder or a pipe is refused at once."""
    path = tmp_path / "lock"
    path.write_text("mine")
    acquire(path).close()
    assert path.read_text() == "mine"
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        acquire(tmp_path / "folder")
    subprocess.run(["mkfifo", str(tmp_path / "pipe")], check=True)
    with pytest.raises(OSError, match="pipe is not a regular file"):
        acquire(tmp_path / "pipe")


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_not_a_holder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """It is said to have none; whoever can do without a lock gets an open file."""

    def refuse(*_: object) -> None:
        raise OSError(code, "whatever")

    monkeypatch.setattr(fcntl, "flock", refuse)
    path = tmp_path / "lock"
    with pytest.raises(NoLocks) as refused:
        acquire(path, wait_seconds=5.0)
    assert refused.value.errno == code
    with pytest.raises(NoLocks):
        is_held(path)
    with acquire(path, needs_locks=False) as lock:
        assert not lock.closed


def test_another_failure_of_a_lock_is_told_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fails is neither a holder nor a file system without locks, also for who can do without."""

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", fail)
    for needs_locks in (True, False):
        with pytest.raises(OSError, match="Input/output error") as failed:
            acquire(tmp_path / "lock", needs_locks=needs_locks)
        assert not isinstance(failed.value, NoLocks)
