"""Processes of one start of a command: found by a mark in their environment, waited for, and killed by their ids.

Not a benchmark itself: the starts and kills of benchmarks/chaos.py.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Role = Literal["parent", "launcher", "rank", "worker"]
Kind = Literal["parent", "launcher", "rank", "worker", "group"]
"""What a SIGKILL hits. parent: the command itself. launcher: the process below `uft train` that forks the ranks, or
torchrun. rank: one rank. worker: any other process, such as one that tokenises. group: all of them, in a random order.
"""

_MARK = "UFT_CHAOS_START"
_RANK_MODULE, _LAUNCHER_MODULE = "uft_ds.train", "torch.distributed.run"
_SECONDS_BETWEEN_LOOKS = 0.003
FRESH_SECONDS = 0.5
"""Age of what is known of a start's processes at which a kill may rely on it."""


class Hang(Exception):
    """A start, or a process of it, did not end in time; it has been killed."""


@dataclass(frozen=True)
class Process:
    """A process of a start, as it was at one moment."""

    pid: int
    role: Role


@dataclass(frozen=True)
class Start:
    """A command that has been started. mark: the value that its processes carry. log: its terminal output."""

    process: subprocess.Popen[bytes]
    mark: str
    log: Path
    began: float
    seen: set[int] = field(default_factory=set)
    """Every process that was ever seen. One that is dying has no environment any more, and may still hold locks."""
    newest: list[tuple[float, list[Process]]] = field(default_factory=list)
    """When all of /proc was last looked through, and what was found."""

    @property
    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def processes(self, max_age_seconds: float = 0.0) -> list[Process]:
        """All processes that live now, those whose parent has died included.

        max_age_seconds: how old the answer may be. To look through /proc takes longer than to write a checkpoint.
        """
        if self.newest and time.monotonic() < self.newest[0][0] + max_age_seconds:
            return self.newest[0][1]
        words, parents = {}, {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            with suppress(OSError):  # it has just ended
                if f"{_MARK}={self.mark}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                    pid = int(entry.name)
                    words[pid] = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
                    parents[pid] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        self.seen.update(parents)
        found = [Process(pid, self._role(pid, words, parents)) for pid in sorted(parents)]
        self.newest[:] = [(time.monotonic(), found)]
        return found

    def dying(self) -> list[int]:
        """Processes that have been seen and are not yet gone: files and locks of a zombie's threads are still open."""
        return [pid for pid in self.seen if _has_threads(pid)]

    def _role(self, pid: int, words: Mapping[int, list[str]], parents: Mapping[int, int]) -> Role:
        if pid == self.process.pid:
            return "parent"
        title = " ".join(words[pid])
        if _LAUNCHER_MODULE in words[pid] or title.startswith("uft_ds ranks"):
            return "launcher"
        if title.startswith(f"{_RANK_MODULE} "):  # forked
            return "rank"
        # A process that tokenises may have been forked from a rank, whose words it has then.
        is_launched = _LAUNCHER_MODULE in words.get(parents[pid], [_LAUNCHER_MODULE])
        return "rank" if _RANK_MODULE in words[pid] and is_launched else "worker"


def start(command: list[str], environment: Mapping[str, str], log: Path) -> Start:
    """Start a command in a process group of its own; its output goes to a file."""
    mark, began = uuid.uuid4().hex, time.time()
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={_MARK: mark, **environment},  # first: a forked rank shows as much of it as there is room for
        )
    return Start(process, mark, log, began)


def wait_until(started: Start, is_now: Callable[[], bool], timeout_seconds: float) -> bool:
    """Wait for a moment; False if the command has ended before.

    Raises:
        Hang: neither came in time.
    """
    deadline = time.monotonic() + timeout_seconds
    while not is_now():
        started.processes(FRESH_SECONDS)
        if started.process.poll() is not None:
            return False
        if time.monotonic() > deadline:
            _end(started)
            raise Hang(f"still running after {timeout_seconds:.0f} s, and the moment has not come")
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    return started.process.poll() is None


def wait_for_exit(started: Start, timeout_seconds: float) -> int:
    """The command's exit code.

    Raises:
        Hang: it did not end in time.
    """
    try:
        return started.process.wait(timeout_seconds)
    except subprocess.TimeoutExpired:
        _end(started)
        raise Hang(f"still running after {timeout_seconds:.0f} s") from None


def kill(started: Start, wanted: Kind, rng: random.Random) -> Kind | None:
    """SIGKILL; where no such process lives, the command itself is killed.

    Returns:
        what was killed; None if nothing was alive any more.
    """
    processes = started.processes(2 * FRESH_SECONDS)
    chosen = [process for process in processes if wanted in ("group", process.role)]
    if not chosen:
        wanted, chosen = "parent", [process for process in processes if process.role == "parent"]
    if chosen and wanted in ("rank", "worker"):
        chosen = [rng.choice(chosen)]
    rng.shuffle(chosen)
    killed = [_kill(process.pid) for process in chosen]
    if wanted == "group":  # what has been started since
        killed += [_kill(process.pid) for process in started.processes()]
    return wanted if any(killed) else None


def seconds_to_end(started: Start, timeout_seconds: float) -> float:
    """How long it took until no process of the start was left.

    Raises:
        Hang: some are still there; they have been killed.
    """
    began = time.monotonic()
    while (left := started.processes()) or started.dying():
        if time.monotonic() > began + timeout_seconds:
            _end(started)
            roles = ", ".join(f"{process.role} {process.pid}" for process in left) or f"dying {started.dying()}"
            raise Hang(f"alive {timeout_seconds:.0f} s after the command: {roles}")
        time.sleep(0.02)
    return time.monotonic() - began


def _end(started: Start) -> None:
    while processes := started.processes():
        for process in processes:
            _kill(process.pid)
        time.sleep(0.02)
    started.process.wait()


def _kill(pid: int) -> bool:
    """Whether the process was there, and no zombie."""
    if not _has_threads(pid):
        return False
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def _has_threads(pid: int) -> bool:
    """Whether a process still has a thread that is no zombie. A number is not given twice within seconds."""
    for task in Path(f"/proc/{pid}/task").glob("*"):
        with suppress(OSError):
            if (task / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
                return True
    return False
