"""The output folder, and caches."""

import errno
import fcntl
import time
from pathlib import Path
from typing import Any

import pytest

from uft_ds.doctor import disk
from uft_ds.doctor.caches import check_caches, check_hub
from uft_ds.doctor.disk import check_lock, check_names, check_output, check_space, check_speed

GIB = 2**30


def test_a_good_folder_is_left_as_it_was(tmp_path: Path) -> None:
    """One that does not exist yet: everything is ok or short of room, and nothing is made."""
    findings = check_output(tmp_path / "not" / "yet")
    assert [finding.name for finding in findings] == ["disk space", "write speed", "file locks", "file system"]
    assert [finding.state for finding in findings[2:]] == ["ok", "ok"]
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written() -> None:
    """One finding, by name."""
    (finding,) = check_output(Path("/proc/nowhere"))
    assert finding.state == "problem"
    assert "/proc cannot be written" in finding.found


@pytest.mark.parametrize(("free", "state"), [(GIB, "problem"), (10 * GIB, "note"), (100 * GIB, "ok")])
def test_too_little_space(tmp_path: Path, free: int, state: str) -> None:
    """Under 2 GiB no run is safe, under 20 no merged model has room."""
    assert check_space(tmp_path, tmp_path, lambda _: (200 * GIB, 0, free)).state == state


def test_a_slow_or_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """1 MiB in a fifth of a second is slow; a quota is met while writing."""
    monkeypatch.setattr(disk.os, "fsync", lambda _: time.sleep(0.2))
    assert check_speed(tmp_path, size=2**20).state == "note"

    def full(_: int) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(disk.os, "fsync", full)
    finding = check_speed(tmp_path, size=2**20)
    assert finding.state == "problem"
    assert "Disk quota exceeded" in finding.found


def test_the_time_for_writing_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However much there is to write."""
    monkeypatch.setattr(disk.os, "fsync", lambda _: time.sleep(0.05))
    started = time.monotonic()
    check_speed(tmp_path, size=2**40, seconds=0.2)
    assert time.monotonic() - started < 5


def test_locks_that_fail_or_do_not_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without locks says so; one that pretends is found by another process."""
    assert check_lock(tmp_path).state == "ok"

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert "No locks available" in check_lock(tmp_path).found
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    pretended = check_lock(tmp_path)
    assert pretended.state == "problem"
    assert "two processes hold one lock" in pretended.found


@pytest.mark.parametrize(("method", "named"), [("hardlink_to", "hard link"), ("symlink_to", "symbolic link")])
def test_a_file_system_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, named: str) -> None:
    """As FAT: which operation is missing is said."""
    assert check_names(tmp_path).state == "ok"
    for path in tmp_path.iterdir():
        path.unlink()

    def refuse(*_: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, method, refuse)
    finding = check_names(tmp_path)
    assert finding.state == "problem"
    assert f"no {named}" in finding.found


def test_caches_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Ours and the hub's, each with its variable."""
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    own, hub = check_caches({"HF_HOME": "/proc/elsewhere"})
    assert (own.state, hub.state) == ("problem", "problem")
    assert "XDG_CACHE_HOME" in own.remedy
    assert "HF_HOME" in hub.remedy
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    own, hub = check_caches({})
    assert (own.found, hub.found) == (str(tmp_path / "uft_ds"), str(tmp_path / "huggingface"))
    assert list(tmp_path.iterdir()) == []


def test_offline_is_said() -> None:
    """A name that is not cached will be an error."""
    assert check_hub({"HF_HUB_OFFLINE": "1"}).state == "note"
    assert check_hub({"HF_HUB_OFFLINE": "0"}).state == "ok"
