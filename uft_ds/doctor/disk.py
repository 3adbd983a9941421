"""The folder that runs are written to: space, speed, and what a run's folder asks of its file system."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from uft_ds.doctor.finding import Finding
from uft_ds.files import sync

_GIB, _MIB = 2**30, 2**20
LEAST_BYTES, FEW_BYTES = 2 * _GIB, 20 * _GIB
"""A run of a small model; a merged 7B model in bfloat16."""
SLOW_BYTES_A_SECOND = 20 * _MIB
_SAMPLE_BYTES, _SAMPLE_SECONDS = 256 * _MIB, 3.0
_TRY_LOCK = "import fcntl, sys; fcntl.flock(open(sys.argv[1]), fcntl.LOCK_EX | fcntl.LOCK_NB)"

Used = Callable[[Path], tuple[int, int, int]]
"""folder -> (total, used, free) bytes."""


@contextmanager
def scratch(output: Path) -> Iterator[Path]:
    """An empty folder on the output's file system, removed afterwards, also after an interrupt.

    Raises:
        OSError: nothing can be written there.
    """
    with tempfile.TemporaryDirectory(prefix=".uft-doctor-", dir=nearest(output), ignore_cleanup_errors=True) as name:
        yield Path(name)


def nearest(folder: Path) -> Path:
    """The folder, or the closest one above that exists."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def check_output(output: Path, used: Used = shutil.disk_usage) -> list[Finding]:
    """Everything about the output folder; a single finding where nothing can be written."""
    try:
        with scratch(output) as folder:
            return [
                check_space(folder, output, used),
                check_speed(folder),
                check_lock(folder),
                check_names(folder),
            ]
    except OSError as error:
        found = f"{nearest(output)} cannot be written ({error.strerror})"
        return [Finding("output folder", "problem", found, "give another one: --output here, output=PATH in a recipe")]


def check_space(folder: Path, output: Path, used: Used = shutil.disk_usage) -> Finding:
    """Checkpoints are small; merged models and hub caches are not."""
    free = used(folder)[2]
    found = f"{free / _GIB:.1f} GiB free for {output}"
    inodes = os.statvfs(folder)
    if inodes.f_files and not inodes.f_favail:
        return Finding(
            "disk space", "problem", f"no inodes left for {output}", "delete files, or give another --output"
        )
    if free < LEAST_BYTES:
        return Finding("disk space", "problem", found, "make room: old checkpoints by `uft checkpoint rm`")
    if free < FEW_BYTES:
        return Finding("disk space", "note", found, "a merged 7B model takes 15 GiB: convert it to another disk")
    return Finding("disk space", "ok", found)


def check_speed(folder: Path, *, size: int = _SAMPLE_BYTES, seconds: float = _SAMPLE_SECONDS) -> Finding:
    """256 MiB, or as much as goes in 3 seconds, until it is on the disk."""
    path, block = folder / "speed", os.urandom(_MIB)
    written, started = 0, time.monotonic()
    try:
        with path.open("wb") as file:
            while written < size and time.monotonic() - started < seconds:
                file.write(block)
                written += len(block)
                if written % (16 * _MIB) == 0:  # so that the time is the disk's, not the page cache's
                    file.flush()
                    os.fsync(file.fileno())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return Finding(
            "write speed", "problem", f"{written // _MIB} MiB, then {error.strerror}", "a quota? See quota -s"
        )
    rate = written / max(time.monotonic() - started, 1e-6)
    path.unlink()
    found = f"{rate / _MIB:.0f} MiB/s with fsync"
    if rate < SLOW_BYTES_A_SECOND:
        return Finding("write speed", "note", found, "checkpoints are written beside training; raise checkpoint_every")
    return Finding("write speed", "ok", found)


def check_lock(folder: Path) -> Finding:
    """A run's folder belongs to one process group: another process must be refused the lock."""
    path = folder / "lock"
    with path.open("w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            remedy = "another folder, or mount NFS with locks (without nolock)"
            return Finding("file locks", "problem", f"none on this file system ({error.strerror})", remedy)
        other = subprocess.run([sys.executable, "-S", "-c", _TRY_LOCK, str(path)], capture_output=True, check=False)
    if other.returncode == 0:
        remedy = "another folder, or mount NFS with locks (without nolock)"
        return Finding("file locks", "problem", "two processes hold one lock: runs could share a folder", remedy)
    return Finding("file locks", "ok", "hold between processes")


def check_names(folder: Path) -> Finding:
    """Files appear whole by a rename; a run's first status by a hard link; `latest` is a symbolic link."""
    one, two, link, latest = (folder / name for name in ("one", "two", "link", "latest"))
    one.write_text("new")
    two.write_text("old")
    for operation, work in (
        ("rename over a file", lambda: one.replace(two)),
        ("hard link", lambda: link.hardlink_to(two)),
        ("symbolic link", lambda: latest.symlink_to("two")),
        ("fsync of a folder", lambda: sync(folder)),
    ):
        try:
            work()
        except OSError as error:
            remedy = "another folder: FAT and some network and FUSE file systems lack it"
            return Finding("file system", "problem", f"no {operation} ({error.strerror})", remedy)
    if link.read_text() != "new":
        return Finding("file system", "problem", "a rename leaves the old content", "another folder")
    return Finding("file system", "ok", "renames, hard and symbolic links, fsync")
