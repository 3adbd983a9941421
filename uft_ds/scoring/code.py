"""Scores by a function of the user's, or by a pattern, in processes of their own with a time limit for each item."""

from __future__ import annotations

import importlib.util
import json
import os
import queue
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from uft_ds.errors import UserError
from uft_ds.host.files import sha256
from uft_ds.host.terminal import in_one_line
from uft_ds.scoring.item import Item, Judgement, failed, found
from uft_ds.scoring.rows import written
from uft_ds.scoring.threads import in_threads
from uft_ds.scoring.worker import pattern_function

IMPORT_SECONDS = 120.0
"""How long the import of the user's module may take."""


class CodeScorer:
    """Asks `package.module:function`, or a pattern, for the score of each item.

    A function that takes too long, exits or crashes costs its item alone: its process is killed and started again.
    """

    def __init__(self, kind: str, target: str, *, seconds: float, workers: int) -> None:
        """
        Args:
            kind: "code" or "regex". seconds: the longest that one item may take, by the clock.
        Raises:
            UserError: the function cannot be imported, or the pattern is none.
        """
        self._kind, self._target, self._seconds = kind, target, seconds
        self._identity = _identity_of(kind, target)
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._workers: list[_Worker] = []
        self._num_workers = workers
        self.batch_items = 32 * workers

    def identity(self) -> Mapping[str, Any]:
        return self._identity

    def start(self, count: int = 1) -> None:
        """Start the first `count` processes, so that what cannot be used is found before the first item.

        Raises:
            UserError: the function cannot be imported.
        """
        while len(self._workers) < count:
            worker = _Worker(self._kind, self._target, self._seconds, self._check_unchanged)
            self._workers.append(worker)
            worker.start()
            self._idle.put(worker)

    def score(self, items: Sequence[Item]) -> list[Judgement]:
        self.start(min(self._num_workers, len(items)))
        return in_threads(self._judged, items, len(self._workers))

    def close(self) -> None:
        for worker in self._workers:
            worker.kill()

    def _check_unchanged(self) -> None:
        """A process that is started later imports the file as it is then: its scores would be another scorer's."""
        if _identity_of(self._kind, self._target) != self._identity:
            raise UserError(
                f"--by {self._kind}:{self._target}: the file has changed while it was used; score with the new one "
                "into another --out, or undo the change and give the same command again"
            )

    def _judged(self, item: Item) -> Judgement:
        worker = self._idle.get()
        try:
            return worker.ask(item)
        finally:
            self._idle.put(worker)


def _identity_of(kind: str, target: str) -> dict[str, Any]:
    if kind == "regex":
        try:
            pattern_function(target)
        except Exception as error:  # noqa: BLE001 - re.error, OverflowError, RecursionError
            raise UserError(f"--by regex: {target!r} is no pattern ({error})") from None
        return {"scorer": "regex", "pattern": target}
    module, _, name = target.partition(":")
    if not module or not name:
        raise UserError(f"--by code: found {target!r}, expected package.module:function")
    return {"scorer": f"code:{target}", "module_sha256": _module_hash(module)}


def _module_hash(module: str) -> str | None:
    """The SHA-256 of the module's file, so that judgements of another version are not taken for its own."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        spec = importlib.util.find_spec(module)
    except Exception as error:  # noqa: BLE001 - a parent package is imported for this, and may raise anything
        raise UserError(f"--by code: {module} cannot be imported ({type(error).__name__}: {error})") from None
    finally:
        sys.path.remove(here)
    if spec is None:
        raise UserError(f"--by code: no module {module}; it is looked for in the working directory and in PYTHONPATH")
    file = Path(spec.origin) if spec.origin else None
    return sha256(file) if file is not None and file.is_file() else None


class _Worker:
    """One process of the user's code."""

    def __init__(self, kind: str, target: str, seconds: float, check: Callable[[], None]) -> None:
        """check: called whenever the process has imported the function; raises UserError if that is another one."""
        self._words = [sys.executable, "-m", "uft_ds.scoring.worker", kind, target, str(seconds)]
        self._what = f"--by {kind}:{target}"
        self._seconds, self._check = seconds, check
        self._process: subprocess.Popen[bytes] | None = None
        self._read = b""

    def start(self) -> None:
        """Start the process, and wait until it has imported the function.

        Raises:
            UserError: the function cannot be imported.
        """
        self._read = b""
        # A session of its own: Ctrl-C goes to this process alone, which ends the others.
        self._process = subprocess.Popen(
            self._words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        answer = self._answer(IMPORT_SECONDS)
        if answer is None or "unusable" in answer:
            ended = self._ended_how(IMPORT_SECONDS)
            raise UserError(f"{self._what} cannot be used: {ended if answer is None else answer['unusable']}")
        self._check()

    def ask(self, item: Item) -> Judgement:
        """The judgement of one item; the process is started again if this one has ended it."""
        if self._process is None:
            self.start()
        assert self._process is not None
        assert self._process.stdin is not None
        asked = {"messages": written(item.messages), "response": item.response, "meta": item.meta}
        try:
            self._process.stdin.write(json.dumps(asked).encode() + b"\n")
            self._process.stdin.flush()
            answer = self._answer(self._seconds)
        except BrokenPipeError:
            answer = None
        if answer is None:
            return failed(self._ended_how(self._seconds))
        if "value" in answer:
            return found(answer["value"])
        return failed(in_one_line(answer["reason"], 500))

    def kill(self) -> None:
        """End the process and those that it has started."""
        process, self._process = self._process, None
        if process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # it leads its session, so its id is that of its group
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()

    def _answer(self, seconds: float) -> dict[str, Any] | None:
        """The next line of the process; None if it has ended, or none came in time."""
        assert self._process is not None
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        deadline = time.monotonic() + seconds
        while b"\n" not in self._read:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([descriptor], [], [], left)[0]:
                return None
            read = os.read(descriptor, 65536)
            if not read:
                return None
            self._read += read
        line, _, self._read = self._read.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _ended_how(self, seconds: float) -> str:
        assert self._process is not None
        try:
            code = self._process.wait(timeout=0.2)
        except subprocess.TimeoutExpired:
            self.kill()
            return f"not done after {seconds:g} s (its process was killed)"
        self.kill()
        if code < 0:
            return f"its process was ended by {signal.Signals(-code).name}"
        return f"its process ended with exit code {code}"
