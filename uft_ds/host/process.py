"""Settings of a process towards the system: its parent, its signals and its freed memory."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from uft_ds.errors import EXIT_INTERRUPTED

LAUNCHED_BY = "UFT_LAUNCHED_BY"
"""Environment variable: the process id of the `uft` command that a rank belongs to."""


def die_with_parent() -> None:
    """On Linux: have this process killed when its parent dies, so that no orphan writes while a restarted run does.

    The parent may have died before this call, because a Python process needs a moment until it gets here, and one of
    `multiprocessing` imports what it works with first. Then this process ends. Call it as early as possible.
    """
    if sys.platform != "linux":
        return
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if _is_orphan():
        os._exit(EXIT_INTERRUPTED)


def _is_orphan() -> bool:
    parent, command = multiprocessing.parent_process(), os.environ.get(LAUNCHED_BY)
    if parent is not None and not parent.is_alive():
        return True
    return (command is not None and not _is_alive(command)) or _has_lost_torchrun()


def _has_lost_torchrun() -> bool:
    """Whether torchrun started this process and init is its parent now. In a container torchrun may be process 1."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.getppid() != 1:
        return False
    try:
        return not Path("/proc/1/exe").samefile("/proc/self/exe")
    except OSError:  # process 1 is another user's, so it is not torchrun
        return True


def _is_alive(process_id: str) -> bool:
    """Whether a process runs. A zombie does not: its parent may be waiting for our output to end."""
    try:
        state = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def become_launcher() -> None:
    """Set up signals in a child process that is going to start ranks, and have it die with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # the ranks inherit this until they install their handler
    die_with_parent()


@contextmanager
def ended_as_by_ctrl_c() -> Iterator[None]:
    """Within the block SIGTERM and SIGHUP end the command as Ctrl-C does, so that it removes what is not complete.

    After the first one all others are ignored: launchers and terminals send several, and the removal takes a moment. A
    signal that was ignored before, as SIGHUP is under nohup, stays ignored. Only the main thread may call it.

    Raises:
        KeyboardInterrupt: with the signal's name, where the signal arrives.
    """
    numbers = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]

    def end(number: int, frame: FrameType | None) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt(signal.Signals(number).name)

    before = {number: signal.signal(number, end) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def show_as(words: Seq[str], variables: Mapping[str, str]) -> None:
    """On Linux: let `ps` and /proc show this process by other words and variables than those it was started with.

    A forked process has those of its parent. They lie in the memory of the first program, where they are replaced; the
    environment itself, `os.environ`, does not change.
    """
    try:
        fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        words_start, words_end, variables_start, end = map(int, fields[45:49])  # arg_start to env_end in proc(5)
    except (OSError, ValueError):
        return
    if not 0 < words_start < words_end == variables_start < end:
        return
    os.environ.update(dict(os.environ))  # moves the variables out of that memory
    # Longer than the words before: the system then reads on behind their end, and tools split the text at its spaces.
    text = os.fsencode(" ".join(words)).ljust(words_end - words_start + 1)
    shown = b"\0".join([text, *(os.fsencode(f"{name}={value}") for name, value in variables.items())])
    shown = shown[: end - words_start - 1]
    ctypes.memset(words_start, 0, end - words_start)
    ctypes.memmove(words_start, shown, len(shown))


@contextmanager
def helpers_without_usr1() -> Iterator[None]:
    """Within the block, processes that this thread starts are protected from SIGUSR1.

    Slurm sends the signal that stops a run to every process of a job step, and it would kill a helper process. A
    signal mask is inherited, handlers are not, so the signal is blocked here. This thread receives its own SIGUSR1 at
    the end of the block; another thread may receive it, and call the handler, at once.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def returning_freed_memory() -> Iterator[None]:
    """Within the block, glibc returns freed blocks of 1 MiB and more to the system.

    By default it keeps blocks of up to 32 MiB. While a model is loaded, each parameter is gathered whole for a moment
    between two shards that stay, and the holes add up. Measured on two ranks with 1.4 GiB of weights: rank 1 needs
    1.43 times the model's size without this and 0.58 times with it (benchmarks/loading_memory.py).
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
