"""One HTTP request to a server of the user's own: no proxy, no redirect, a time limit, and it can be cut off."""

from __future__ import annotations

import http.client
import io
import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, urlsplit

from uft_ds.errors import UserError
from uft_ds.host.terminal import in_one_line

CONNECT_SECONDS = 10.0
"""Longest wait for a connection: a machine that takes longer is not there."""
_MAX_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Reply:
    """What a server has answered, whatever the status."""

    status: int
    body: bytes


class NoReply(Exception):
    """There is no whole answer.

    is_late: whether the server had taken the request and did not answer in time.
    """

    def __init__(self, reason: str, *, is_late: bool = False) -> None:
        super().__init__(reason)
        self.is_late = is_late


def key_in(name: str | None, setting: str, environ: Mapping[str, str] = os.environ) -> str | None:
    """The key of a server, from an environment variable; None if no variable is named.

    Args:
        setting: that names the variable, for messages.
    Raises:
        UserError: the environment lacks it, or holds what is no key.
    """
    if name is None:
        return None
    key = environ.get(name, "").strip()
    if not key:
        raise UserError(f"{setting}: the environment has no {name}, or it is empty")
    if not (key.isascii() and key.isprintable()):  # a header could not hold it, and the error would show it
        raise UserError(
            f"{setting}: {name} holds a line break or another character that no key has; expected the key alone, in "
            "ASCII"
        )
    return key


class UnderWay:
    """The requests that wait for their answers, so that another thread can cut them off, all at once and for good.

    A server such as vLLM ends the work on a request whose connection is closed.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._cut = threading.Event()

    def cut_off(self) -> None:
        """Close all connections, and end all pauses. Later requests fail at once."""
        with self._lock:
            self._cut.set()
            for connected in self._sockets:
                with suppress(OSError):
                    connected.shutdown(socket.SHUT_RDWR)

    def pause(self, seconds: float) -> None:
        """Sleep between two requests.

        Raises:
            NoReply: all have been cut off.
        """
        if self._cut.wait(seconds):
            raise NoReply("the requests were cut off")

    @contextmanager
    def listed(self, connected: socket.socket) -> Iterator[None]:
        """Within the block, the connection can be cut off.

        Raises:
            NoReply: all have been cut off already.
        """
        with self._lock:
            if self._cut.is_set():
                raise NoReply("the requests were cut off")
            self._sockets.add(connected)
        try:
            yield
        finally:
            with self._lock:
                self._sockets.discard(connected)


def parsed_url(url: str) -> SplitResult:
    """The parts of a URL that can be asked.

    Raises:
        ValueError: it is none; says why.
    """
    parts = urlsplit(url)
    host = (parts.hostname or "").encode("idna")
    parts.path.encode("ascii")
    _ = parts.port  # raises ValueError, as the others do
    if parts.scheme not in ("http", "https"):
        raise ValueError("neither http:// nor https://")
    if not host:
        raise ValueError("without a host")
    if not url.isprintable() or " " in url:
        raise ValueError("with a space or a letter that cannot be printed")
    return parts


def exchange(
    method: str,
    url: str,
    body: bytes | None = None,
    *,
    headers: Mapping[str, str],
    seconds: float,
    under_way: UnderWay,
) -> Reply:
    """Send one request and read the whole answer.

    A proxy in the environment is not asked: the names of a cluster's own machines mean nothing to it.

    Args:
        url: one that `parsed_url` accepts. seconds: the longest that it may take from the connection on.
    Raises:
        NoReply: no connection, no answer in time, or one that was cut.
    """
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(str(parts.hostname), parts.port, timeout=min(seconds, CONNECT_SECONDS))
    target = f"{parts.path or '/'}{f'?{parts.query}' if parts.query else ''}"
    try:
        try:
            connection.connect()
        except OSError as error:
            raise NoReply(f"no connection ({_said(error)})") from None
        connected = connection.sock
        with under_way.listed(connected):
            until = time.monotonic() + seconds
            connected.settimeout(seconds)
            connection.response_class = _limited(until)
            connection.request(method, target, body, dict(headers))
            with connection.getresponse() as response:
                return Reply(response.status, _read(response))
    except TimeoutError:
        raise NoReply(f"no answer within {seconds:g} s", is_late=True) from None
    # A ValueError comes from a connection with TLS that another thread has cut off.
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise NoReply(f"the connection was cut ({_said(error)})") from None
    finally:
        connection.close()


class _UntilThen(io.RawIOBase):
    """What a connection receives until a moment. A socket's own time limit begins anew with each byte that arrives."""

    def __init__(self, connected: socket.socket, until: float) -> None:
        self._connected, self._until = connected, until
        self._received = connected.makefile("rb", buffering=0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        remaining = self._until - time.monotonic()
        if remaining <= 0:
            raise TimeoutError
        self._connected.settimeout(remaining)
        return self._received.readinto(buffer)

    def close(self) -> None:
        self._received.close()
        super().close()


def _limited(until: float) -> type[http.client.HTTPResponse]:
    """Responses whose headers and body have to arrive before a moment."""

    class Limited(http.client.HTTPResponse):
        def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
            super().__init__(sock, *args, **kwargs)
            self.fp.close()
            self.fp = io.BufferedReader(_UntilThen(sock, until))

    return Limited


def _read(response: http.client.HTTPResponse) -> bytes:
    """The whole body."""
    read = bytearray()
    while not response.isclosed():
        read += (block := response.read1(65536))
        if not block:
            break
        if len(read) > _MAX_BYTES:
            raise NoReply(f"an answer of more than {_MAX_BYTES >> 20} MiB")
    length = response.headers.get("Content-Length")
    if length is not None and length.isdecimal() and len(read) < int(length):
        raise NoReply(f"the connection was cut after {len(read)} of {length} bytes")
    return bytes(read)


def _said(error: Exception) -> str:
    return str(error) or type(error).__name__


def words_of(body: bytes) -> str:
    """What a server says of an error, for people: the message in its JSON, or the text, shortened to one line."""
    text = body[:4096].decode("utf-8", "replace")
    try:
        value = json.loads(text)
        inner = value.get("error", value.get("message", value.get("detail")))
        text = inner if isinstance(inner, str) else str(inner["message"])
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        pass
    return in_one_line(text, 200)
