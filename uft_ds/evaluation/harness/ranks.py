"""Processes that answer together: started here, or by torchrun, DeepSpeed's launcher or Slurm.

They share nothing but the evaluation's folder. Each rank but the first shows in a file there that it lives, so that the
first one does not wait for ever for one that another machine has lost.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from uft_ds.errors import UserError
from uft_ds.evaluation.harness.planned import Place
from uft_ds.host.process import LAUNCHED_BY

_SECONDS_BETWEEN_BEATS = 5.0
_SECONDS_TO_LIVE = 120.0
_SECONDS_TO_START = 900.0
_SECONDS_TO_END = 10.0


@contextmanager
def beating(folder: Path, rank: int) -> Iterator[None]:
    """Within the block, a file says that this rank lives: it is renewed every few seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    ended = threading.Event()

    def beat() -> None:
        while True:
            _beat_of(folder, rank).write_text(f"{os.getpid()} {time.monotonic_ns()}\n")
            if ended.wait(_SECONDS_BETWEEN_BEATS):
                return

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def watch(folder: Path, size: int, now: Callable[[], float] = time.monotonic) -> Callable[[], str | None]:
    """Tells which of the other ranks has not shown for two minutes that it lives; None while all have.

    Clocks of other machines are not trusted: what counts is when their files were seen to change.
    """
    begun = now()
    seen: dict[int, tuple[str, float]] = {}

    def lost() -> str | None:
        for rank in range(1, size):
            with suppress(OSError):
                text = _beat_of(folder, rank).read_text()
                if seen.get(rank, ("", 0.0))[0] != text:
                    seen[rank] = (text, now())
            last, allowed = (seen[rank][1], _SECONDS_TO_LIVE) if rank in seen else (begun, _SECONDS_TO_START)
            if now() - last > allowed:
                return f"process {rank} of {size} has not shown for {now() - last:.0f} s that it lives"
        return None

    return lost


@contextmanager
def started(count: int, folder: Path) -> Iterator[Place]:
    """Within the block, `count` - 1 more processes run this process's own command, as ranks 1 and up.

    What they print goes to rank-N.log in the folder. They are ended with the block.
    """
    environment = os.environ | {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        LAUNCHED_BY: str(os.getpid()),
    }
    logs: list[Path] = []
    children: list[subprocess.Popen[bytes]] = []
    with ExitStack() as stack:
        for rank in range(1, count):
            logs.append(folder / f"rank-{rank}.log")
            output = stack.enter_context(logs[-1].open("wb"))
            child = subprocess.Popen(
                [sys.executable, "-m", "uft_ds", *sys.argv[1:]],
                env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            children.append(stack.enter_context(_ended(child)))

        def lost() -> str | None:
            for rank, (child, log) in enumerate(zip(children, logs, strict=True), 1):
                if child.poll() is not None:
                    said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
                    why = f": {said[-1]}" if said and child.returncode else ""
                    return f"process {rank} of {count} has ended with exit code {child.returncode}{why}"
            return None

        yield Place(0, count, lost)
    for log in logs:
        log.unlink(missing_ok=True)  # not after an error, which it may explain


@contextmanager
def _ended(child: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    try:
        yield child
    finally:
        if child.poll() is None:
            child.terminate()
            try:
                child.wait(_SECONDS_TO_END)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def check_count(count: int, gpus: int) -> None:
    """Refuse more processes than GPUs, where there are any.

    Raises:
        UserError: names both numbers.
    """
    if gpus and count > gpus:
        raise UserError(f"--processes: {count} given, but this machine has {gpus} GPUs; give at most as many")


def _beat_of(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.alive"
