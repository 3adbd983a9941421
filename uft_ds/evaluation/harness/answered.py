"""The answers of an evaluation so far, on the disk: what is there is not asked again, by any process.

    rank-N.jsonl     one line a batch of requests: {"batch": its key, "answers": one an request}
    agreed.json      what the first rank has measured and the others take over

Each rank appends to its own file and reads all of them, so ranks need a shared folder and nothing else. A line that a
kill has left unfinished is dropped; its batch is asked again.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

from uft_ds.errors import CheckFailed
from uft_ds.host.files import write_atomically

_AGREED = "agreed.json"
_SECONDS_BETWEEN_SYNCS = 1.0
_SECONDS_BETWEEN_LOOKS = 0.1


def key_of(kind: str, requests: Seq[Any]) -> str:
    """A name, hex, for a batch of requests: their kind and arguments, in their order."""
    text = json.dumps([kind, *requests], ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


class Answers:
    """The answers of all ranks, by the key of their batch."""

    def __init__(self, folder: Path, rank: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._rank = folder, rank
        self._found: dict[str, list[Any]] = {}
        self._read_to: dict[Path, int] = {}
        own = folder / f"rank-{rank}.jsonl"
        _drop_unfinished(own)
        self._file = own.open("a", encoding="utf-8")
        self._synced = time.monotonic()
        self.look()

    def close(self) -> None:
        self._sync()
        self._file.close()

    def look(self) -> None:
        """Read what other ranks have written since the last look."""
        for path in sorted(self._folder.glob("rank-*.jsonl")):
            start = self._read_to.get(path, 0)
            with path.open("rb") as file:
                file.seek(start)
                whole = file.read().rpartition(b"\n")[0]
            if not whole:
                continue
            self._read_to[path] = start + len(whole) + 1
            for line in whole.split(b"\n"):
                if line:
                    entry = json.loads(line)
                    self._found[entry["batch"]] = entry["answers"]

    def get(self, key: str) -> list[Any] | None:
        return self._found.get(key)

    def add(self, key: str, answers: list[Any]) -> None:
        """Keep a batch's answers. After a crash of the machine those of the last second may be asked again."""
        self._found[key] = answers
        self._file.write(json.dumps({"batch": key, "answers": answers}, ensure_ascii=False) + "\n")
        self._file.flush()
        if time.monotonic() - self._synced > _SECONDS_BETWEEN_SYNCS:
            self._sync()

    def wait_for(self, keys: Seq[str], is_lost: Callable[[], str | None], on_look: Callable[[list[str]], None]) -> None:
        """Wait until other ranks have written all these batches.

        Args:
            is_lost: why another rank will write nothing more; None while all may still write.
            on_look: called with the keys that are there.
        Raises:
            CheckFailed: another rank is lost.
        """
        self._sync()
        while any(key not in self._found for key in keys):
            lost = is_lost()  # before the look: what it wrote before its end is read
            self.look()
            on_look([key for key in keys if key in self._found])
            if lost is not None and any(key not in self._found for key in keys):
                raise CheckFailed(f"{lost}; what was answered is kept, and the same command goes on")
            time.sleep(_SECONDS_BETWEEN_LOOKS)

    def agreed(self, name: str, measure: Callable[[], int]) -> int:
        """A number that rank 0 measures once; the other ranks, and later tries of the same evaluation, take it over."""
        path = self._folder / _AGREED
        while True:
            known: dict[str, int] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            if name in known:
                return known[name]
            if self._rank == 0:
                write_atomically(path, json.dumps(known | {name: measure()}) + "\n")
            else:
                time.sleep(_SECONDS_BETWEEN_LOOKS)

    def _sync(self) -> None:
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()


def _drop_unfinished(path: Path) -> None:
    """Cut a file behind its last whole line, so that the next line begins on its own."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rpartition(b"\n")[0]
    end = len(whole) + 1 if whole else 0
    if end != len(content):
        os.truncate(path, end)
