"""Requests to an OpenAI-compatible endpoint: time limits, repeated tries, a pace, and a budget."""

from __future__ import annotations

import http.client
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from uft_ds.errors import UserError
from uft_ds.host.web import parsed_url, words_of
from uft_ds.scoring.item import Tokens
from uft_ds.scoring.pacing import (
    LONGEST_ASKED_SECONDS,
    Budget,
    Pace,
    back_off_seconds,
    retry_after_seconds,
)

BYTES_PER_TOKEN = 3
"""A low estimate for English and code, so that what is set aside for a prompt is rather too much. Of bytes, because a
letter of Chinese, which is three, is often a token of its own."""

_MAX_REPLY_BYTES = 8 * 2**20
_TRY_AGAIN = (408, 409, 425, 429)
"""Besides all of 500 and above: what may be another time."""
_WRONG_FOR_ALL = {
    401: "the key is missing or not accepted; --judge-key-env names the variable that holds it",
    403: "the key may not use this endpoint or model",
    404: "no such address or model; expected a URL such as https://host/v1, and a model that it serves",
    405: "no such address; expected a URL such as https://host/v1",
}


@dataclass(frozen=True)
class Endpoint:
    """Where a judge is asked, and how patiently.

    url: up to `/v1`; `/chat/completions` is added. key: sent as bearer token; never stored, logged or hashed.
    body: fields of each request besides `messages`: model, temperature, max_tokens and others.
    seconds: the longest that one request may take. tries: how often a request is sent at most.
    """

    url: str
    body: Mapping[str, Any] = field(hash=False)
    key: str | None = field(default=None, repr=False)
    seconds: float = 120.0
    tries: int = 6


class RequestFailed(Exception):
    """A request that was answered by an error, or not at all, as often as it was tried."""

    def __init__(self, reason: str, *, is_unreachable: bool = False) -> None:
        super().__init__(reason)
        self.is_unreachable = is_unreachable


@dataclass(frozen=True)
class Reply:
    """The text of an answer, the tokens that it took, and the model's name as the endpoint gives it."""

    text: str
    spent: Tokens
    model: str


class Client:
    """Sends requests; it may be used by several threads at once."""

    def __init__(self, endpoint: Endpoint, pace: Pace, budget: Budget) -> None:
        """
        Raises:
            UserError: the URL is none.
        """
        _check_url(endpoint.url)
        self._endpoint, self._pace, self._budget = endpoint, pace, budget
        self._address = endpoint.url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        self._opener = urllib.request.build_opener(_NoRedirect)
        self._lock = threading.Lock()
        self.repeated = 0
        """How many requests were sent again."""

    def estimate(self, messages: list[dict[str, str]]) -> Tokens:
        """The tokens that a request may take at most, from its bytes and its `max_tokens`."""
        length = sum(len(message["content"].encode("utf-8", "surrogatepass")) for message in messages)
        body = self._endpoint.body
        longest = body.get("max_tokens") or body.get("max_completion_tokens") or 1024
        return Tokens(length // BYTES_PER_TOKEN + 16, int(longest))

    def ask(self, messages: list[dict[str, str]]) -> Reply:
        """The reply to a conversation.

        Raises:
            RequestFailed: there is none for this item. UserError: there would be none for any.
            CheckFailed: the budget is spent, or the scorer has been closed.
        """
        body = {**self._endpoint.body, "messages": messages}
        data = json.dumps({name: value for name, value in body.items() if value is not None}).encode()
        tries = 0
        while True:
            tries += 1
            reserved = self._reserve(messages)
            reply: Reply | None = None
            try:
                self._pace.wait()
                reply = self._sent(data, reserved)
                return reply
            except _TryAgain as error:
                if tries >= self._endpoint.tries:
                    reason = f"{error} (tried {tries} times)"
                    raise RequestFailed(reason, is_unreachable=error.is_unreachable) from None
                if error.retry_after is not None:
                    self._pace.hold(error.retry_after)
                wait = back_off_seconds(tries, error.retry_after)
            finally:
                self._budget.settle(reserved, Tokens() if reply is None else reply.spent)
            with self._lock:
                self.repeated += 1
            self._pace.sleep(wait)

    def _reserve(self, messages: list[dict[str, str]]) -> Tokens:
        reserved = self.estimate(messages)
        self._budget.set_aside(reserved)
        return reserved

    def _sent(self, data: bytes, reserved: Tokens) -> Reply:
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "uft_ds"}
        if self._endpoint.key is not None:
            headers["Authorization"] = f"Bearer {self._endpoint.key}"
        request = urllib.request.Request(self._address, data=data, headers=headers, method="POST")
        deadline = time.monotonic() + self._endpoint.seconds
        try:
            with self._opener.open(request, timeout=self._endpoint.seconds) as response:
                return _reply_of(_read(response, deadline), reserved)
        except urllib.error.HTTPError as error:
            with error:
                raise self._refused(error) from None
        except TimeoutError:
            raise _TryAgain(f"no answer within {self._endpoint.seconds:g} s", is_unreachable=True) from None
        except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
            reason = getattr(error, "reason", None) or error
            if isinstance(reason, TimeoutError):
                reason = f"no answer within {self._endpoint.seconds:g} s"
            raise _TryAgain(
                f"the connection failed ({str(reason) or type(reason).__name__})", is_unreachable=True
            ) from None

    def _refused(self, error: urllib.error.HTTPError) -> Exception:
        said = _first_words(error)
        if self._endpoint.key is not None:
            said = said.replace(self._endpoint.key, "***")
        status = f"HTTP {error.code}{f' ({said})' if said else ''}"
        if error.code in _WRONG_FOR_ALL:
            return UserError(f"--judge-url {self._address}: {status}: {_WRONG_FOR_ALL[error.code]}")
        if 300 <= error.code < 400:
            return UserError(f"--judge-url {self._address}: {status}: it leads elsewhere; give the final address")
        if error.code < 500 and error.code not in _TRY_AGAIN:
            return RequestFailed(status)
        wait = retry_after_seconds(dict(error.headers.items()))
        if wait is not None and wait > LONGEST_ASKED_SECONDS:
            return RequestFailed(f"{status}, and it asks for a wait of {wait:.0f} s")
        return _TryAgain(status, retry_after=wait)


def _check_url(url: str) -> None:
    """Refuse what could not be asked: each request would fail by it, after all its tries."""
    expected = "expected a URL such as http://127.0.0.1:8000/v1"
    try:
        parts = parsed_url(url)
    except ValueError as error:
        raise UserError(f"--judge-url: found {url!r}, {expected} ({error})") from None
    if parts.username or parts.password:
        raise UserError("--judge-url: holds a user name or password; give a key by --judge-key-env")
    if parts.query or parts.fragment:
        raise UserError(f"--judge-url: found {url!r}, {expected}, without a query: /chat/completions is added to it")


class _TryAgain(Exception):
    def __init__(self, reason: str, *, retry_after: float | None = None, is_unreachable: bool = False) -> None:
        super().__init__(reason)
        self.retry_after, self.is_unreachable = retry_after, is_unreachable


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A key is for one address, and a POST that is led elsewhere becomes a GET."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _read(response: http.client.HTTPResponse, deadline: float) -> bytes:
    """The whole body. A server that sends a byte now and then meets the deadline, too."""
    read = b""
    while True:
        block = response.read1(65536)
        read += block
        if not block:
            break
        if time.monotonic() > deadline:
            raise TimeoutError
        if len(read) > _MAX_REPLY_BYTES:
            raise RequestFailed(f"its reply has more than {_MAX_REPLY_BYTES >> 20} MiB")
    length = response.headers.get("Content-Length")
    if length is not None and length.isdecimal() and len(read) < int(length):
        raise _TryAgain("the connection was cut", is_unreachable=True)
    return read


def _reply_of(body: bytes, reserved: Tokens) -> Reply:
    try:
        value = json.loads(body)
        text = value["choices"][0]["message"]["content"]
        if text is None:  # a model that thinks, cut off in its thoughts: paid for, and without a verdict
            text = ""
        if not isinstance(text, str):
            raise TypeError
    except (ValueError, LookupError, TypeError, RecursionError):
        raise _TryAgain(f"no chat completion: {body[:80]!r}") from None
    usage = value.get("usage") if isinstance(value.get("usage"), Mapping) else {}
    counts: list[Any] = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    known = all(isinstance(count, int) and not isinstance(count, bool) and count >= 0 for count in counts)
    # Without a count the reply takes what was set aside: a limit must hold with any endpoint.
    return Reply(text, Tokens(*counts) if known else reserved, str(value.get("model", "")))


def _first_words(error: urllib.error.HTTPError) -> str:
    """What the endpoint says of an error, for people."""
    try:
        return words_of(error.read(4096))
    except (OSError, http.client.HTTPException):
        return ""
