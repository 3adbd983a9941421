"""Check the output folder: space, write speed, and the file-system features that a run's folder needs."""

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
from uft_ds.host.files import sync

_GIB, _MIB = 2**30, 2**20
LEAST_BYTES, FEW_BYTES = 2 * _GIB, 20 * _GIB
"""Enough for a run of a small model; enough for a merged 7B model in bfloat16."""
SLOW_BYTES_A_SECOND = 20 * _MIB
_SAMPLE_BYTES, _SAMPLE_SECONDS = 256 * _MIB, 3.0
_LEAST_SAMPLE_BYTES = 64 * _MIB
"""A smaller sample would measure the disk's cache, not the disk."""
_LOCK_SECONDS = 20.0
_REFUSED = 75
"""The helper's exit code for a lock that another process holds; Python's own failures never use it."""
# Opened for writing: NFS implements an exclusive flock as a byte-range lock, which needs a writable file (else EBADF).
_TRY_LOCK = f"""
import fcntl, sys
try:
    fcntl.flock(open(sys.argv[1], "r+"), fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    sys.exit({_REFUSED})
"""
_LOCAL_LOCKS = {"nolock", "local_lock=flock", "local_lock=all", "localflock", "localflocks", "nobrl"}
"""Mount options that restrict flock to this machine: three of NFS, then Lustre, OCFS2 and GFS2, SMB."""
_MOUNTS = Path("/proc/self/mountinfo")

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
    """The folder, or its closest existing parent."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def check_output(output: Path, used: Used = shutil.disk_usage) -> list[Finding]:
    """All findings about the output folder; a single one if nothing can be written there."""
    if output.exists() and not output.is_dir():
        return [Finding("output folder", "problem", f"{output} is not a folder", "give another one: --output")]
    try:
        with scratch(output) as folder:
            return [
                check_space(folder, output, used),
                check_speed(folder, used),
                check_lock(folder),
                check_names(folder),
            ]
    except OSError as error:
        found = f"{nearest(output)} cannot be written ({error.strerror})"
        return [Finding("output folder", "problem", found, "give another one: --output here, output=PATH in a recipe")]


def check_space(folder: Path, output: Path, used: Used = shutil.disk_usage) -> Finding:
    """Check free bytes and inodes: checkpoints are small, merged models and hub caches are not."""
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


def check_speed(
    folder: Path,
    used: Used = shutil.disk_usage,
    *,
    size: int = _SAMPLE_BYTES,
    seconds: float = _SAMPLE_SECONDS,
) -> Finding:
    """Measure the write speed including fsync: 256 MiB, at most 3 seconds, and at most a tenth of the free space."""
    most = used(folder)[2] // 10
    if most < _LEAST_SAMPLE_BYTES:
        found = f"not measured: a tenth of what is free is {most // _MIB} MiB, expected {_LEAST_SAMPLE_BYTES // _MIB}"
        return Finding("write speed", "note", found, "make room: see disk space")
    path, block, size = folder / "speed", os.urandom(_MIB), min(size, most)
    written, started = 0, time.monotonic()
    try:
        with path.open("wb") as file:
            while written + len(block) <= size and time.monotonic() - started < seconds:
                file.write(block)
                written += len(block)
                if written % (16 * _MIB) == 0:  # so that the disk is measured, not the page cache
                    file.flush()
                    os.fsync(file.fileno())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        path.unlink(missing_ok=True)  # the next checks need a few free bytes
        return Finding(
            "write speed", "problem", f"{written // _MIB} MiB, then {error.strerror}", "a quota? See quota -s"
        )
    rate = written / max(time.monotonic() - started, 1e-6)
    path.unlink()
    found = f"{rate / _MIB:.0f} MiB/s with fsync"
    if rate < SLOW_BYTES_A_SECOND:
        return Finding("write speed", "note", found, "checkpoints are written during training; raise checkpoint_every")
    return Finding("write speed", "ok", found)


def check_lock(folder: Path, mounts: Path = _MOUNTS) -> Finding:
    """Check file locks, by which a run owns its folder: a second process must not get the lock, also on other nodes."""
    path, remedy = folder / "lock", "another folder, or mount NFS with locks (without nolock)"
    with path.open("w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return Finding("file locks", "problem", f"none on this file system ({error.strerror})", remedy)
        option = _local_locks(file.fileno(), mounts)
        failure = _second_holder(path)
    if failure:
        return Finding("file locks", "problem", failure, remedy)
    if option:
        found = f"hold on this machine only (mounted with {option}): runs of two nodes could share a folder"
        return Finding("file locks", "note", found, f"mount it without {option}, or give each run its own folder")
    return Finding("file locks", "ok", "hold between processes")


def check_names(folder: Path) -> Finding:
    """Check renames (files are written under a temporary name first), symbolic links (`latest`) and fsync."""
    one, two, latest = (folder / name for name in ("one", "two", "latest"))
    one.write_text("new")
    two.write_text("old")
    for operation, work in (
        ("rename over a file", lambda: one.replace(two)),
        ("symbolic link", lambda: latest.symlink_to("two")),
        ("fsync of a folder", lambda: sync(folder)),
    ):
        try:
            work()
        except OSError as error:
            remedy = "another folder: FAT and some network and FUSE file systems lack it"
            return Finding("file system", "problem", f"no {operation} ({error.strerror})", remedy)
    if two.read_text() != "new":
        return Finding("file system", "problem", "a rename leaves the old content", "another folder")
    return Finding("file system", "ok", "renames, symbolic links, fsync")


def _second_holder(path: Path) -> str:
    """What is wrong if another process requests the lock that this one holds; empty if it is refused, as it must be."""
    command = [sys.executable, "-S", "-c", _TRY_LOCK, str(path)]
    try:
        other = subprocess.run(command, capture_output=True, text=True, timeout=_LOCK_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"another process asked for the lock and had no answer in {_LOCK_SECONDS:g} s"
    except OSError as error:
        return f"another process could not ask for the lock: {sys.executable}, {error.strerror}"
    if other.returncode == _REFUSED:
        return ""
    if other.returncode == 0:
        return "two processes hold one lock: runs could share a folder"
    said = (other.stderr.strip().splitlines() or ["it printed nothing"])[-1]
    return f"another process could not ask for the lock: exit code {other.returncode}, {said}"


def _local_locks(descriptor: int, mounts: Path) -> str:
    """The mount options that restrict the open file's locks to this machine, comma-separated; empty if there are none.

    mounts: a file like /proc/self/mountinfo: `id parent major:minor root point options [tags] - type source options`
        in each line.
    """
    try:
        about = Path(f"/proc/self/fdinfo/{descriptor}").read_text(encoding="utf-8")
        lines = mounts.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:  # there is no /proc, or it lacks these files
        return ""
    asked = next((line.split()[1] for line in about.splitlines() if line.startswith("mnt_id:")), None)
    for fields in (line.split() for line in lines):
        if fields and fields[0] == asked:
            options = {*fields[5].split(","), *fields[-1].split(",")}
            return ", ".join(sorted(options & _LOCAL_LOCKS))
    return ""
