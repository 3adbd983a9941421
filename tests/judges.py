"""A stand-in for a judge: an OpenAI-compatible server that answers as it is told, with faults switched on."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

NONCE = re.compile(r'\{"(verdict_[0-9a-f]{24})": (?:GRADE|CHOICE|rating)\}')
"""The name of a request, where the form of the verdict is told: an answer may hold other names, at any place."""


@dataclass
class Asked:
    """One request: the question and its parts, as a judge reads them."""

    question: str
    nonce: str
    headers: dict[str, str]
    body: dict[str, Any]
    number: int

    def between(self, name: str) -> str:
        """The text in the fence of a part: `prompt`, `answer`, `answer_a`, `answer_b`, or a key of meta."""
        start, end = f"<<<{name} {self.nonce}>>>\n", f"\n<<<end of {name} {self.nonce}>>>"
        return self.question.partition(start)[2].partition(end)[0]


@dataclass
class Fault:
    """An answer other than a chat completion."""

    status: int = 500
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b'{"error": {"message": "not now"}}'
    cut: bool = False
    drips: bool = False
    seconds: float = 0.0


Answer = Callable[[Asked], str | Fault]


def grade(value: Any) -> Answer:
    return lambda asked: f'Some words first.\n{{"{asked.nonce}": {json.dumps(value)}}}'


@dataclass
class StandIn:
    """The running server. answer: what it says; may be replaced at any time."""

    url: str
    answer: Answer
    asked: list[Asked] = field(default_factory=list)
    most_at_once: int = 0
    usage: bool = True


@contextmanager
def judge(answer: Answer) -> Iterator[StandIn]:
    """A server on a free port for the time of the block."""
    lock = threading.Lock()
    now = 0

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            nonlocal now
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            question = body["messages"][-1]["content"]
            nonce = NONCE.search("\n".join(message["content"] for message in body["messages"]))
            assert nonce is not None
            with lock:
                asked = Asked(question, nonce[1], dict(self.headers.items()), body, len(stand_in.asked))
                stand_in.asked.append(asked)
                now += 1
                stand_in.most_at_once = max(stand_in.most_at_once, now)
            try:
                self._send(stand_in.answer(asked))
            except (BrokenPipeError, ConnectionResetError):
                pass  # the client had waited long enough
            finally:
                with lock:
                    now -= 1

        def _send(self, said: str | Fault) -> None:
            if isinstance(said, Fault):
                time.sleep(said.seconds)
                if said.drips:
                    self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
                    for _ in range(100):
                        self.wfile.write(b" ")
                        time.sleep(0.02)
                    return
                if said.cut:
                    self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{")
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                self._write(
                    said.status, said.body.replace(b"KEY", (self.headers["Authorization"] or "").encode()), said.headers
                )
                return
            value: dict[str, Any] = {"model": "stand-in", "choices": [{"message": {"content": said}}]}
            if stand_in.usage:
                value["usage"] = {"prompt_tokens": 100, "completion_tokens": 10}
            self._write(200, json.dumps(value).encode(), {})

        def _write(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    stand_in = StandIn(f"http://127.0.0.1:{server.server_address[1]}/v1", answer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield stand_in
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
