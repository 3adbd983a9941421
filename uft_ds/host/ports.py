"""A free port for ranks to meet at."""

from __future__ import annotations

import random
import socket
from pathlib import Path

from uft_ds.errors import UserError

_LOWEST, _HIGHEST = 20_000, 29_499  # above lie the launchers' own, 29500, and the ports of Kubernetes' services
_OUTGOING = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_port() -> int:
    """A port at which nothing on this machine listens.

    From below the range that outgoing connections get theirs from, where there is one below: a port of that range may
    be theirs before the first rank, seconds later, listens at it.

    Raises:
        UserError: there is none.
    """
    first_outgoing = int(_OUTGOING.read_text().split()[0]) if _OUTGOING.exists() else _HIGHEST + 1
    candidates = range(_LOWEST, min(_HIGHEST + 1, first_outgoing))
    draw = random.SystemRandom()  # processes that were seeded alike must not choose alike
    for port in draw.sample(candidates, min(100, len(candidates))):
        if is_free(port):
            return port
    with socket.socket() as probe:
        try:
            probe.bind(("", 0))
        except OSError as error:
            raise UserError(f"no port is free ({error.strerror}); see net.ipv4.ip_local_port_range") from None
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
