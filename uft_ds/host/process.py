"""What a process tells its surroundings before it starts to work."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from uft_ds.errors import EXIT_INTERRUPTED

LAUNCHED_BY = "UFT_LAUNCHED_BY"
"""Environment variable: the process id of the `uft` command that a rank belongs to."""


def die_with_parent() -> None:
    """Linux: be killed when the parent dies, so that no orphan writes beside a restart.

    The parent may be gone before this is called, a rank's imports taking seconds: then the command that started them is
    gone too.
    """
    if sys.platform != "linux":
        return
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    command = os.environ.get(LAUNCHED_BY)
    if command is not None and not _is_alive(command):
        os._exit(EXIT_INTERRUPTED)


def _is_alive(process_id: str) -> bool:
    """Not so for a zombie: whoever waits for it may be waiting for our output to end."""
    try:
        state = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


@contextmanager
def helpers_without_usr1() -> Iterator[None]:
    """Within the block, processes that this thread starts never get SIGUSR1, and it gets its own at the block's end.

    Slurm sends the signal that asks a run to stop to every process of a step, and in a helper it would be fatal. A mask
    is inherited, handlers are not. Sent to the whole process, it may reach another thread, and so the handler, at once.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def returning_freed_memory() -> Iterator[None]:
    """Within the block, glibc gives blocks of a mebibyte and more back to the system when they are freed.

    Otherwise it keeps them, up to 32 MiB each: while a model is loaded, every parameter is gathered whole for a moment
    between two shards that stay, and the holes add up. Measured on two ranks, 1.4 GiB of weights: 1.43 times the
    model's size on rank 1 without this, 0.58 with it (benchmarks/loading_memory.py).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    m_mmap_threshold, while_loading, glibc_maximum = -3, 2**20, 2**25
    if mallopt is not None:
        mallopt(m_mmap_threshold, while_loading)
    try:
        yield
    finally:
        if mallopt is not None:
            mallopt(m_mmap_threshold, glibc_maximum)
