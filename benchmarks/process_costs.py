"""Memory and processor time of processes, as Linux counts them.

Not a benchmark itself.
"""

from __future__ import annotations

import resource
from pathlib import Path


def own_bytes(name: str) -> int:
    """A number of this process's /proc/self/status, such as VmRSS (resident), VmHWM (its peak) or RssAnon (private).

    Raises:
        RuntimeError: the system does not give it.
    """
    found = _status_bytes("self", name)
    if found is None:
        raise RuntimeError(f"no {name} in /proc/self/status")
    return found


def status_bytes(process: int, name: str) -> int:
    """The same number of another process; 0 where it has ended."""
    try:
        return _status_bytes(process, name) or 0
    except OSError:
        return 0


def _status_bytes(process: int | str, name: str) -> int | None:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":")), None)


def reset_peak() -> int:
    """Start a new peak of resident memory; the present value, bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_rss()


def peak_rss() -> int:
    """The peak of resident memory, bytes: of this process's life, or since `reset_peak`."""
    return own_bytes("VmHWM")


def cpu_seconds_of_children() -> float:
    """Of the processes that this one has started and waited for, and of theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
