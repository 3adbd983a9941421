"""How fast, and how much, a judge may be asked: requests a minute, waits between tries, and a limit on tokens."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from uft_ds.errors import CheckFailed
from uft_ds.scoring.item import Tokens

FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 1.0, 60.0
LONGEST_ASKED_SECONDS = 600.0
"""A server that asks for a longer wait than this is not waited for."""


class Pace:
    """Spaces requests evenly, so that no minute has more than a given number."""

    def __init__(self, requests_per_minute: float | None, ended: threading.Event) -> None:
        self._seconds_apart = 0.0 if requests_per_minute is None else 60 / requests_per_minute
        self._next = 0.0
        self._lock = threading.Lock()
        self._ended = ended

    def wait(self) -> None:
        """Wait for the next free moment."""
        with self._lock:
            at = max(time.monotonic(), self._next)
            self._next = at + self._seconds_apart
        self.sleep(at - time.monotonic())

    def hold(self, seconds: float) -> None:
        """Begin no request for this long: the server has asked one of them to wait, and means all."""
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)

    def sleep(self, seconds: float) -> None:
        """Wait, but not longer than until the scorer is closed.

        Raises:
            CheckFailed: it has been closed.
        """
        if seconds > 0:
            self._ended.wait(seconds)
        if self._ended.is_set():
            raise CheckFailed("the scorer has been closed")


def back_off_seconds(tries: int, retry_after: float | None, draw: float | None = None) -> float:
    """How long to wait after the `tries`-th failure: doubled each time, with full jitter, and as long as is asked for.

    Args:
        retry_after: seconds that the server asks for. draw: from 0 to 1; None: at random.
    """
    longest = min(LONGEST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2 ** (tries - 1))
    jitter = random.random() if draw is None else draw
    # Several clients that were told the same moment must not come back at the same one.
    return longest * jitter if retry_after is None else retry_after + min(1.0, longest) * jitter


def retry_after_seconds(headers: Mapping[str, str], now: datetime | None = None) -> float | None:
    """The `Retry-After` of a reply in seconds, which is a number or a date (RFC 9110, 10.2.3); None without one."""
    # Names of headers have no case, and uvicorn, which serves vLLM, writes them in small letters.
    value = next((value for name, value in headers.items() if name.lower() == "retry-after"), None)
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        at = parsedate_to_datetime(value)
    except ValueError:
        return None
    if at.tzinfo is None:
        at = at.replace(tzinfo=UTC)
    return max(0.0, (at - (now or datetime.now(UTC))).total_seconds())


class Budget:
    """A limit on tokens or on cost. What a request may take is set aside before it is sent, so the limit holds.

    prompt_price, completion_price: per million tokens, in any currency.
    """

    def __init__(
        self,
        *,
        max_tokens: int | None = None,
        max_cost: float | None = None,
        prompt_price: float = 0.0,
        completion_price: float = 0.0,
    ) -> None:
        self._max_tokens, self._max_cost = max_tokens, max_cost
        self._prices = prompt_price, completion_price
        self._spent, self._set_aside = Tokens(), Tokens()
        self._settled = threading.Condition()
        self._keep: Callable[[Tokens], None] = lambda tokens: None

    def begin(self, spent: Tokens, keep: Callable[[Tokens], None]) -> None:
        """Count the tokens of earlier runs for the same output; from now on call `keep` with those of each reply."""
        self._spent, self._keep = self._spent + spent, keep

    def cost(self, tokens: Tokens) -> float:
        prompt_price, completion_price = self._prices
        return (tokens.prompt * prompt_price + tokens.completion * completion_price) / 1e6

    def set_aside(self, tokens: Tokens) -> None:
        """Reserve what a request may take.

        Raises:
            CheckFailed: it would exceed the limit.
        """
        with self._settled:
            # Requests that are under way have set aside more than they take, as a rule: their end may leave enough.
            while self._set_aside.total and self._problem(tokens, self._set_aside):
                self._settled.wait()
            problem = self._problem(tokens, self._set_aside)
            if problem:
                raise CheckFailed(problem)
            self._set_aside += tokens

    def settle(self, reserved: Tokens, spent: Tokens) -> None:
        """Replace a reservation by what the request has taken."""
        with self._settled:
            self._set_aside += Tokens(-reserved.prompt, -reserved.completion)
            self._spent += spent
            if spent.total:
                self._keep(spent)
            self._settled.notify_all()

    def _problem(self, tokens: Tokens, set_aside: Tokens) -> str:
        """Why a request may not be sent; empty if it may."""
        after = self._spent + set_aside + tokens
        if self._max_tokens is not None and after.total > self._max_tokens:
            return (
                f"--max-tokens-spent {self._max_tokens:,}: {self._spent.total:,} tokens are spent, and the next "
                f"request may take {tokens.total:,}"
            )
        if self._max_cost is not None and self.cost(after) > self._max_cost:
            return (
                f"--max-cost {self._max_cost:g}: {self.cost(self._spent):.4f} is spent, and the next request may cost "
                f"{self.cost(tokens):.4f}"
            )
        return ""
