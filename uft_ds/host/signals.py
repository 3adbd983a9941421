"""Being asked to stop: each rank hears a signal by itself, all ranks agree on it between two steps.

    SIGUSR1     the time limit is near (`sbatch --signal`), or `uft train` passes on what it was asked
    SIGTERM     pre-emption, scancel, kill
    SIGINT      Ctrl-C

Before the first step there is nothing to save: a signal ends a rank where it is. It is only noted while modules are
imported, for an import that is broken off may be swallowed and leave a library half there; and while steps are run, for
a rank that left by itself would leave the others in a collective.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType

from uft_ds.errors import Stopped

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """What this process has been asked; `number` is the first signal that came, 0 for none."""

    def __init__(self) -> None:
        self.number = 0
        self._is_heeded = False

    def hear(self, number: int, frame: FrameType | None = None) -> None:
        """A signal's handler.

        Raises:
            Stopped: at once, between `heed` and `only_note`. A second signal changes nothing: launchers send several.
        """
        if self.number:
            return
        self.number = number
        if self._is_heeded:
            self._leave()

    def heed(self) -> None:
        """From now on a signal ends this rank.

        Raises:
            Stopped: one has come already.
        """
        self._is_heeded = True
        if self.number:
            self._leave()

    def only_note(self) -> None:
        """From now on a signal is noted, and nothing else, as it is at first."""
        self._is_heeded = False

    def _leave(self) -> None:
        raise Stopped(f"stopped by {name_of(self.number)} before it trained; nothing is lost")


class Stop:
    """Whether the run stops here: what any rank has heard, at the same place for all of them."""

    def __init__(self, request: StopRequest, agree: Callable[[int], int]) -> None:
        """
        Args:
            agree: the largest of a number over all ranks.
        """
        self._request, self._agree = request, agree

    def check(self) -> None:
        """Every rank must call it, between two forwards.

        Raises:
            Stopped: on every rank, if any rank has been asked to stop.
        """
        number = self._agree(self._request.number)
        if number:
            raise Stopped(f"stopped by {name_of(number)}", by_all=True)


NEVER = Stop(StopRequest(), lambda number: 0)
"""For work that nobody asks to stop."""


def listen() -> StopRequest:
    """Take over the signals that ask a rank to stop."""
    request = StopRequest()
    for number in STOP_SIGNALS:
        signal.signal(number, request.hear)
    return request


def name_of(number: int) -> str:
    """SIGTERM for 15."""
    return signal.Signals(number).name
