"""A free port for ranks to meet at."""

from __future__ import annotations

import random
import socket
from pathlib import Path

_LOWEST, _HIGHEST = 20_000, 32_767
_OUTGOING = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_port() -> int:
    """A port that nothing on this machine is bound to.

    From below the range that outgoing connections get theirs from, where there is one below: a port of that range may
    be theirs before the first rank, seconds later, listens at it.
    """
    first_outgoing = int(_OUTGOING.read_text().split()[0]) if _OUTGOING.exists() else _HIGHEST + 1
    candidates = range(_LOWEST, min(_HIGHEST + 1, first_outgoing))
    draw = random.SystemRandom()  # processes that were seeded alike must not choose alike
    for port in draw.sample(candidates, min(100, len(candidates))):
        if is_free(port):
            return port
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def is_free(port: int) -> bool:
    """Whether a server of this machine could listen at it."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
        return True
