"""How long a lost server is waited for."""

from __future__ import annotations

import time
from collections.abc import Callable

from uft_ds.errors import GeneratorLost
from uft_ds.scoring.pacing import back_off_seconds

_SLICE_SECONDS = 0.2


class Patience:
    """Waits after each failure, doubling the wait, until there has been no progress for a number of seconds.

    Progress is an answer, not health: a server that starts again and again, or that fails on one request alone, would
    else be waited for without end.
    """

    def __init__(self, seconds: float, url: str, *, stop: Callable[[], None], on_event: Callable[[str], None]) -> None:
        """
        Args:
            stop: called while waiting; what it raises ends the wait. on_event: is told of the first failure, and of the
                first answer after it.
        """
        self._seconds, self._url, self._stop, self._on_event = seconds, url, stop, on_event
        self._since: float | None = None
        self._failures = 0

    def progressed(self) -> None:
        """There was an answer."""
        if self._since is not None:
            self._on_event(f"generator: {self._url} answers again after {time.monotonic() - self._since:.0f} s")
        self._since, self._failures = None, 0

    def failed(self, error: Exception) -> None:
        """Wait before the next try.

        Raises:
            GeneratorLost: the server has been without an answer for too long.
        """
        now = time.monotonic()
        if self._since is None:
            self._since = now
            self._on_event(f"generator: {self._url}: {error}; it is waited for, at most {self._seconds:g} s")
        self._failures += 1
        remaining = self._since + self._seconds - now
        if remaining <= 0:
            raise GeneratorLost(
                f"generator: {self._url} has given no answer for {now - self._since:.0f} s and {self._failures} tries; "
                f"the last one: {error}. Look into the server's log and start it again, with the same flags; then "
                "`uft train --resume` goes on from the last checkpoint. Several servers behind one address, or "
                "--data-parallel-size above 1, cannot be used: an adapter reaches one of them only"
            )
        self.wait(min(remaining, back_off_seconds(self._failures, None)))

    def wait(self, seconds: float) -> None:
        """Sleep, unless the run is to stop."""
        until = time.monotonic() + seconds
        while True:
            self._stop()
            remaining = until - time.monotonic()
            if remaining <= 0:
                return
            time.sleep(min(_SLICE_SECONDS, remaining))
