"""The output folder, and caches."""

import errno
import fcntl
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import needs
import pytest

from uft_ds.doctor import disk
from uft_ds.doctor.caches import check_caches, check_hub
from uft_ds.doctor.disk import check_lock, check_names, check_output, check_space, check_speed

GIB = 2**30
PYTHON = sys.executable


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


@pytest.mark.parametrize(("free", "most"), [(2 * GIB, 2 * GIB // 10), (100 * GIB, 256 * 2**20)])
def test_at_most_a_tenth_of_what_is_free_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, most: int
) -> None:
    """Of 2 GiB 204 whole MiB, of 100 GiB the full sample: what lies there at the last fsync."""
    sizes: list[int] = []
    monkeypatch.setattr(disk.os, "fsync", lambda descriptor: sizes.append(disk.os.fstat(descriptor).st_size))
    assert check_speed(tmp_path, lambda _: (200 * GIB, 0, free), seconds=60.0).state == "ok"
    assert sizes[-1] == most // 2**20 * 2**20


def test_a_nearly_full_disk_is_not_filled_further(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of 639 MiB is less than 64: no speed, and no file, but a line that says so."""
    monkeypatch.setattr(Path, "open", None)
    finding = check_speed(tmp_path, lambda _: (200 * GIB, 0, 639 * 2**20))
    assert finding.state == "note"
    assert "not measured: a tenth of what is free is 63 MiB" in finding.found


def test_a_nearly_full_folder_gets_every_finding(tmp_path: Path) -> None:
    """The amount that is free reaches the check of speed."""
    findings = check_output(tmp_path, lambda _: (200 * GIB, 0, GIB // 2))
    assert [finding.state for finding in findings] == ["problem", "note", "ok", "ok"]
    assert "not measured" in findings[1].found


def as_python(path: Path, *lines: str) -> str:
    """A program that is called as python is, does the lines first, and runs the code it is given."""
    run = ["*_, code, sys.argv[1:] = *sys.argv[:-1], sys.argv[-1:]", "exec(code)"]
    path.write_text("\n".join([f"#!{PYTHON}", "import fcntl, sys", *lines, *run]))
    path.chmod(0o755)
    return str(path)


def test_locks_as_nfs_does_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """flock by byte ranges, for which a file must be open for writing: held it is refused, not held it is had."""
    monkeypatch.setattr(sys, "executable", as_python(tmp_path / "python", "fcntl.flock = fcntl.lockf"))
    monkeypatch.setattr(fcntl, "flock", fcntl.lockf)
    held = check_lock(tmp_path)
    assert (held.state, held.found) == ("ok", "hold between processes")
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    assert "two processes hold one lock" in check_lock(tmp_path).found


def test_a_failure_to_ask_is_no_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the lock's own refusal is: an error, a start that fails and a wait without end are told as they are."""
    failing = as_python(tmp_path / "python", f"raise OSError({errno.EBADF}, 'Bad file descriptor')")
    monkeypatch.setattr(sys, "executable", failing)
    failed = check_lock(tmp_path)
    assert failed.state == "problem"
    assert "exit code 1, OSError: [Errno 9] Bad file descriptor" in failed.found
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nowhere"))
    assert "No such file" in check_lock(tmp_path).found
    monkeypatch.setattr(disk, "_LOCK_SECONDS", 0.2)
    monkeypatch.setattr(sys, "executable", as_python(tmp_path / "python", "import time; time.sleep(60)"))
    late = check_lock(tmp_path)
    assert late.state == "problem"
    assert "no answer in 0.2 s" in late.found


@pytest.mark.parametrize(
    ("kind", "options", "named"),
    [
        ("nfs", "rw,vers=3,nolock,proto=tcp,local_lock=all,addr=192.0.2.1", "local_lock=all, nolock"),
        ("nfs", "rw,vers=3,local_lock=flock", "local_lock=flock"),
        ("nfs4", "rw,vers=4.2,local_lock=none", ""),
        ("nfs", "rw,vers=3,local_lock=posix", ""),  # of fcntl alone
        ("lustre", "rw,localflock,lazystatfs", "localflock"),
        ("lustre", "rw,flock,lazystatfs", ""),
    ],
)
def test_locks_that_hold_on_one_machine_only(tmp_path: Path, kind: str, options: str, named: str) -> None:
    """By the options of the folder's own mount, whichever others there are; the option is named in the remedy."""
    needs.program("findmnt", "util-linux brings it")
    command = ["findmnt", "--noheadings", "--output", "ID", "--target", str(tmp_path)]
    own = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]
    mounts = tmp_path / "mountinfo"
    others = "7000001 1 0:99 / /elsewhere rw shared:1 - nfs host:/x rw,nolock\n"
    mounts.write_text(f"{others}{own} 1 0:98 / {tmp_path} rw,relatime shared:2 master:3 - {kind} host:/y {options}\n")
    finding = check_lock(tmp_path, mounts)
    assert finding.state == ("note" if named else "ok")
    if named:
        assert f"on this machine only (mounted with {named})" in finding.found
        assert f"without {named}" in finding.remedy


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


def test_a_file_system_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As FAT: which operation is missing is said. Hard links are not needed."""
    assert check_names(tmp_path).state == "ok"
    for path in tmp_path.iterdir():
        path.unlink()

    def refuse(*_: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    with monkeypatch.context() as without_hard_links:
        without_hard_links.setattr(Path, "hardlink_to", refuse)
        assert check_names(tmp_path).state == "ok"
    for path in tmp_path.iterdir():
        path.unlink()
    monkeypatch.setattr(Path, "symlink_to", refuse)
    finding = check_names(tmp_path)
    assert finding.state == "problem"
    assert "no symbolic link" in finding.found


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


def test_an_output_that_is_a_file_is_a_problem(tmp_path: Path) -> None:
    """Not probed in the folder that it lies in."""
    (tmp_path / "output").touch()
    (finding,) = check_output(tmp_path / "output")
    assert finding.state == "problem"
    assert finding.found == f"{tmp_path / 'output'} is not a folder"
