"""Find a free port at which the ranks can meet."""

from __future__ import annotations

import random
import socket
from pathlib import Path

from uft_ds.errors import UserError

_LOWEST, _HIGHEST = 20_000, 29_499  # above: the launchers' default 29500, Kubernetes' services
_OUTGOING = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_port() -> int:
    """A port on which no process of this machine listens.

    If possible it is below the range of ports that outgoing connections use: the system could give a port of that range
    to a connection in the seconds before the first rank listens on it.

    Raises:
        UserError: no port is free.
    """
    first_outgoing = int(_OUTGOING.read_text().split()[0]) if _OUTGOING.exists() else _HIGHEST + 1
    candidates = range(_LOWEST, min(_HIGHEST + 1, first_outgoing))
    draw = random.SystemRandom()  # ignores seeds: processes of one seed need different ports
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
    """Whether a server of this machine could listen on the port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
        return True
