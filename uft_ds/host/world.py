"""The environment variables that a launcher sets for each process. No other module reads them.

RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT    torchrun, DeepSpeed's launcher, our Slurm scripts
LOCAL_WORLD_SIZE                                          torchrun
LOCAL_SIZE                                                DeepSpeed's launcher
TORCHELASTIC_RESTART_COUNT                                torchrun
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from uft_ds.errors import UserError

_REQUIRED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")


@dataclass(frozen=True)
class LauncherEnvironment:
    """A process's rank and the other values of its launcher. The defaults are for a process without a launcher.

    local_rank: the rank on this machine.
    ranks_per_node: number of ranks on this machine; None if the launcher does not set it.
    restart_count: how often torchrun has restarted this run.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    ranks_per_node: int | None = None
    master_address: str = "127.0.0.1"
    master_port: int | None = None
    restart_count: int = 0


def launcher_environment(environ: Mapping[str, str] = os.environ) -> LauncherEnvironment:
    """Read the launcher's variables.

    Raises:
        UserError: names a variable that is not a number.
    """
    ranks_per_node = _number(environ, "LOCAL_WORLD_SIZE", 0) or _number(environ, "LOCAL_SIZE", 0)
    return LauncherEnvironment(
        rank=_number(environ, "RANK", 0),
        world_size=_number(environ, "WORLD_SIZE", 1),
        local_rank=_number(environ, "LOCAL_RANK", 0),
        ranks_per_node=ranks_per_node or None,
        master_address=environ.get("MASTER_ADDR", "127.0.0.1"),
        master_port=given_port(environ),
        restart_count=_number(environ, "TORCHELASTIC_RESTART_COUNT", 0),
    )


def check_launched(environ: Mapping[str, str] = os.environ) -> None:
    """Refuse a process that was not started by a launcher.

    Raises:
        UserError: names the variables that are missing.
    """
    missing = [name for name in _REQUIRED if name not in environ]
    if missing:
        raise UserError(f"{', '.join(missing)} not set: start this module with `uft train`, `deepspeed` or `torchrun`")


def given_port(environ: Mapping[str, str] = os.environ) -> int | None:
    """MASTER_PORT, or None if it is not set.

    Raises:
        UserError: the value is not a port number.
    """
    given = environ.get("MASTER_PORT")
    if given is None:
        return None
    if not (given.isdecimal() and len(given) < 10 and 0 < int(given) < 65536):
        raise UserError(f"MASTER_PORT: found {given!r}, expected a port number")
    return int(given)


def _number(environ: Mapping[str, str], name: str, default: int) -> int:
    given = environ.get(name) or str(default)
    if not (given.isdecimal() and len(given) < 10):
        raise UserError(f"{name}: found {given!r}, expected a whole number, which the launcher sets; unset it")
    return int(given)
