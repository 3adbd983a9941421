"""One HTTP request: whole, late, cut, or cut off by another thread."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest

from uft_ds.host.web import NoReply, Reply, UnderWay, exchange, parsed_url, words_of


@contextmanager
def answering(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """A server that reads one request with the body {} and then does `answer`, for each connection."""
    listening = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connected, _ = listening.accept()
            except OSError:
                return
            with connected:
                read = b""
                while not read.endswith(b"{}"):  # what is not read would reset the connection
                    read += (block := connected.recv(65536))
                    if not block:
                        break
                with suppress(OSError):
                    answer(connected)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        thread.join(10)
        assert not thread.is_alive()


def ask(url: str, seconds: float = 5.0, under_way: UnderWay | None = None) -> Reply:
    return exchange("POST", f"{url}/x", b"{}", headers={}, seconds=seconds, under_way=under_way or UnderWay())


@pytest.mark.parametrize(
    "sent",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello",
        b"HTTP/1.0 200 OK\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    ],
)
def test_a_whole_answer(sent: bytes) -> None:
    """With a length, to the end of the connection, or in chunks."""
    with answering(lambda connected: connected.sendall(sent)) as url:
        assert ask(url) == Reply(200, b"hello")


def test_an_error_is_an_answer() -> None:
    """Whatever the status, and a redirect is not followed."""
    sent = b"HTTP/1.1 307 Elsewhere\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n"
    with answering(lambda connected: connected.sendall(sent)) as url:
        assert ask(url) == Reply(307, b"")


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhel",
        b"not http at all\r\n\r\n",
    ],
)
def test_a_cut_answer_is_none(sent: bytes) -> None:
    """It is not late, so it may be asked for again at once."""
    with answering(lambda connected: connected.sendall(sent)) as url, pytest.raises(NoReply) as raised:
        ask(url)
    assert not raised.value.is_late


@pytest.mark.parametrize(
    ("first", "again"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n", b" "),
        (b"HTTP/1.1 200 OK\r\nX-Long: ", b"x"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    ],
    ids=["body", "headers", "continue"],
)
def test_a_server_that_drips_meets_the_limit(first: bytes, again: bytes) -> None:
    """A byte now and then is no progress, wherever in the answer it is."""

    def drip(connected: socket.socket) -> None:
        connected.sendall(first)
        for _ in range(100):
            connected.sendall(again)
            time.sleep(0.02)

    started = time.monotonic()
    with answering(drip) as url, pytest.raises(NoReply, match=r"within 0\.3 s") as raised:
        ask(url, seconds=0.3)
    assert raised.value.is_late
    assert time.monotonic() - started < 3


def test_no_server_is_not_late() -> None:
    """Nobody has taken the request."""
    with pytest.raises(NoReply, match="no connection") as raised:
        ask("http://127.0.0.1:1")
    assert not raised.value.is_late


def test_another_thread_cuts_requests_off() -> None:
    """The one that waits ends at once, and a later one is not sent."""
    under_way, asked = UnderWay(), threading.Event()

    def wait(connected: socket.socket) -> None:
        asked.set()
        connected.settimeout(20)
        connected.recv(1)  # ends when the client's side is shut

    def cut() -> None:
        asked.wait(10)
        under_way.cut_off()

    with answering(wait) as url:
        threading.Thread(target=cut, daemon=True).start()
        started = time.monotonic()
        with pytest.raises(NoReply):
            ask(url, seconds=20.0, under_way=under_way)
        assert time.monotonic() - started < 10
        with pytest.raises(NoReply, match="cut off"):
            ask(url, under_way=under_way)
        with pytest.raises(NoReply, match="cut off"):
            under_way.pause(60.0)
        assert time.monotonic() - started < 10


def test_a_query_is_sent() -> None:
    """The server is asked for the whole of the URL behind its address."""
    asked: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            connected, _ = listening.accept()
            with connected:
                asked.append(connected.recv(65536))
                connected.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/info?form=json"
        exchange("GET", url, headers={}, seconds=5.0, under_way=UnderWay())
        thread.join(10)
    assert asked[0].startswith(b"GET /info?form=json HTTP/1.1\r\n")


def test_a_proxy_of_the_environment_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy knows no names of a cluster's machines."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    with answering(lambda connected: connected.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")) as url:
        assert ask(url).status == 200


@pytest.mark.parametrize(
    "url", ["", "h", "ftp://h", "http://", "http://h:port", "http://[::1", "http://h h", "http://a..b"]
)
def test_what_is_no_url(url: str) -> None:
    """Each request would fail by it."""
    with pytest.raises(ValueError, match=r"."):
        parsed_url(url)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"error": {"message": "no  such\\nmodel"}}', "no such model"),
        (b'{"error": "no"}', "no"),
        (b'{"message": "no"}', "no"),
        (b'{"detail": "Not Found"}', "Not Found"),
        (b"<html>bad gateway</html>", "<html>bad gateway</html>"),
        (b"\xff" * 9999, "\ufffd" * 200 + " ..."),
        (b"no such model " * 99, " ".join(["no such model"] * 14) + " no ..."),
        (b"", ""),
    ],
)
def test_the_words_of_an_error(body: bytes, words: str) -> None:
    """Its message, on one line, however it is wrapped."""
    assert words_of(body) == words
