"""Requests to stop: each rank receives signals by itself, and all ranks agree on them between two steps.

    SIGUSR1     the time limit is near (`sbatch --signal`), or `uft train` forwards a request
    SIGTERM     pre-emption, scancel, kill
    SIGINT      Ctrl-C

Before the first step there is nothing to save, so a signal ends a rank at once, with two exceptions in which it is only
noted: while modules are imported, because a library may catch the exception and stay half imported; and while steps are
run, because a rank that left alone would leave the others waiting in a collective.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType

from uft_ds.errors import Stopped

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """The request to stop that this process has received; `number` is the first signal, 0 for none."""

    def __init__(self) -> None:
        self.number = 0
        self._is_heeded = False

    def hear(self, number: int, frame: FrameType | None = None) -> None:
        """The signal handler. A second signal changes nothing, because launchers send several.

        Raises:
            Stopped: at once, if called between `heed` and `only_note`.
        """
        if self.number:
            return
        self.number = number
        if self._is_heeded:
            self._leave()

    def heed(self) -> None:
        """From now on, a signal ends this rank at once.

        Raises:
            Stopped: a signal has already been received.
        """
        self._is_heeded = True
        if self.number:
            self._leave()

    def only_note(self) -> None:
        """From now on, a signal is only noted; this is also the initial state."""
        self._is_heeded = False

    def _leave(self) -> None:
        raise Stopped(f"stopped by {name_of(self.number)} before it trained; nothing is lost")


class Stop:
    """Stops the run on all ranks at the same place, if any rank has received a request."""

    def __init__(self, request: StopRequest, agree: Callable[[int], int]) -> None:
        """
        Args:
            agree: returns the largest value of a number over all ranks.
        """
        self._request, self._agree = request, agree

    def check(self) -> None:
        """Stop if any rank was asked to. Every rank must call this between two forwards: it is a collective.

        Raises:
            Stopped: on every rank, if any rank has been asked to stop.
        """
        number = self._agree(self._request.number)
        if number:
            raise Stopped(f"stopped by {name_of(number)}", by_all=True)


NEVER = Stop(StopRequest(), lambda number: 0)
"""For work that is never stopped."""


def listen() -> StopRequest:
    """Install the handler for all stop signals; at first they are only noted."""
    request = StopRequest()
    for number in STOP_SIGNALS:
        signal.signal(number, request.hear)
    return request


def name_of(number: int) -> str:
    """The name of a signal: SIGTERM for 15."""
    return signal.Signals(number).name
