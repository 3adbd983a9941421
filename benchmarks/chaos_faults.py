"""Faults of the file system under a run: a full disk, read-only and vanished folders. Root ignores permission bits.

Not a benchmark itself: part of benchmarks/chaos.py. Each fault is a context manager, and what it broke is whole again
after its block.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from chaos_scenarios import Run

DISK_BYTES = 64 * 2**20


@contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """A file system of its own at `folder`; False where none can be mounted, and the folder is an ordinary one."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "none", str(folder)]
    is_mounted = shutil.which("mount") is not None and _succeeds(command)
    try:
        yield is_mounted
    finally:
        if is_mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextmanager
def _full_disk(run: Run, rng: random.Random) -> Iterator[None]:
    """Between nothing and 400 kB are left, about two checkpoints."""
    ballast = run.folder / "ballast"
    free = shutil.disk_usage(run.folder).free
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, free - rng.randint(0, 400_000)))
    try:
        yield
    finally:
        ballast.unlink()


@contextmanager
def _read_only(folder: Path, aside: Path) -> Iterator[None]:
    """A read-only mount in a folder's place, all at once; files that are open already can be written."""
    aside.mkdir()
    mounted = []
    try:
        for command in (["--bind", folder, aside], ["-o", "remount,bind,ro", aside], ["--bind", aside, folder]):
            subprocess.run(["mount", *map(str, command)], check=True)
            mounted += [command[-1]] if command[0] == "--bind" else []
        yield
    finally:
        for path in reversed(mounted):
            subprocess.run(["umount", "--lazy", str(path)], check=True)
        aside.rmdir()


@contextmanager
def _vanished(path: Path, *, with_file: bool = False, may_return: bool = False) -> Iterator[None]:
    """A folder is somewhere else, for a while.

    may_return: whether the run may make the folder anew; then the old one stays lost. Whatever else was made in its
    place is deleted.
    """
    aside = path.with_name(f"{path.name}-vanished")
    path.rename(aside)
    if with_file:
        path.write_text("a file, where a folder was\n")
    try:
        yield
    finally:
        if path.is_file():
            path.unlink()
        is_new = path.exists() and any(path.iterdir())
        if is_new and may_return:
            shutil.rmtree(aside)
        else:
            shutil.rmtree(path, ignore_errors=True)
            aside.rename(path)


Fault = Callable[[Run, random.Random], AbstractContextManager[None]]
FAULTS: dict[str, Fault] = {
    "full disk": _full_disk,
    "read-only checkpoints": lambda run, rng: _read_only(run.output / "checkpoints", run.folder / "read-only"),
    "read-only run": lambda run, rng: _read_only(run.output, run.folder / "read-only"),
    "vanished checkpoints": lambda run, rng: _vanished(run.output / "checkpoints", may_return=True),
    "vanished run": lambda run, rng: _vanished(run.output),
    "file for checkpoints": lambda run, rng: _vanished(run.output / "checkpoints", with_file=True),
    "vanished data": lambda run, rng: _vanished(run.data),
}
NEED_A_DISK = ("full disk", "read-only checkpoints", "read-only run")


def _succeeds(command: list[str]) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0
