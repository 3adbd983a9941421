"""What is asked of a launcher of ranks, and what it offers while they run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

SECONDS_TO_STOP = 15
"""Time that ranks have between SIGTERM and SIGKILL."""


@dataclass(frozen=True)
class Order:
    """The start of all ranks on this machine.

    arguments: of the ranks' program, `uft_ds.train`.
    environment: all of it, but for the variables that name a rank.
    log: takes the standard error of a rank until it opens its own log.
    """

    arguments: tuple[str, ...]
    environment: dict[str, str]
    num_ranks: int
    port: int
    log: Path


class LaunchedRanks(Protocol):
    """The ranks of one order."""

    def poll(self, seconds: float) -> dict[int, int] | None:
        """Exit codes by rank, once all ranks have ended; None if they have not within `seconds`.

        A negative code is the number of the signal that killed the rank. A rank that was ended because another one
        had failed may be missing.
        """

    def ask_to_stop(self) -> None:
        """Send SIGUSR1 to the ranks. The caller repeats it: a rank that has just started ignores the signal."""

    def end(self) -> None:
        """End the ranks at once: by SIGTERM, and after `SECONDS_TO_STOP` by SIGKILL. Returns when they have ended."""
