"""How much memory this machine, or the container around this process, has."""

from __future__ import annotations

from pathlib import Path

import psutil

_CGROUPS = (("memory.max", "sys/fs/cgroup"), ("memory.limit_in_bytes", "sys/fs/cgroup/memory"))
"""The file of a group's limit and where groups lie: of version 2, and of version 1."""
_SWAP = "memory.swap.max"
"""Of version 2: the swap that a group may have beside its memory."""


def memory_limit_bytes(root: Path = Path("/")) -> int:
    """RAM and swap of the machine, or the limit of the control groups that this process is in, if that is less."""
    machine = psutil.virtual_memory().total + psutil.swap_memory().total
    return min((machine, *_limits(root)))


def _limits(root: Path) -> list[int]:
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        file, top = _CGROUPS[controllers == "memory"]
        folder = root / top / group.lstrip("/")
        # Within a container its own group is mounted at the top, whatever the path says.
        for place in (folder, *folder.parents):
            if place.is_relative_to(root / top):
                swap = _number(place / _SWAP)
                machines = psutil.swap_memory().total  # where the group's own is "max", or not stated
                found += [limit + (swap[0] if swap else machines) for limit in _number(place / file)]
    return found


def _number(path: Path) -> list[int]:
    try:
        text = path.read_text(encoding="utf-8").strip()
    except OSError:
        return []
    return [int(text)] if text.isdigit() else []  # "max": no limit
