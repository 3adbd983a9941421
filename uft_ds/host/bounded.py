"""Limits of time and memory for a program that somebody else wrote, such as a chat template of a downloaded model."""

from __future__ import annotations

import os
import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_PAGE = os.sysconf("SC_PAGE_SIZE")  # bytes


@contextmanager
def bounded(*, seconds: float, memory: int) -> Iterator[None]:
    """Within the block, more CPU time than `seconds` or more new memory than `memory` bytes is an error.

    The time is that of this process alone, not of a clock on the wall: a busy machine changes nothing. Python runs
    signal handlers in the main thread only, so a block in another thread has no limit of time.

    Raises:
        TimeoutError, MemoryError: the block has taken more.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    bounds = [bound for bound in (_address_space() + memory, soft, hard) if bound != resource.RLIM_INFINITY]
    in_main_thread = threading.current_thread() is threading.main_thread()
    # The handler stays: nothing else uses this signal, and setting it anew is the slowest part of a block (7 us).
    if in_main_thread and signal.getsignal(signal.SIGVTALRM) is not _too_long:
        signal.signal(signal.SIGVTALRM, _too_long)
    resource.setrlimit(resource.RLIMIT_AS, (min(bounds), hard))
    try:
        if in_main_thread:
            signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
        yield
    finally:
        if in_main_thread:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _address_space() -> int:
    """Bytes of address space that this process has now."""
    descriptor = os.open("/proc/self/statm", os.O_RDONLY)
    try:
        return int(os.read(descriptor, 32).split()[0]) * _PAGE
    finally:
        os.close(descriptor)


def _too_long(number: int, frame: FrameType | None) -> None:
    raise TimeoutError
