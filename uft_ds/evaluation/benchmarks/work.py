"""What is beside a file of answers, so that an interrupted generation goes on.

    OUT.settings.json    how the answers are made; once OUT is complete, its SHA-256 and the answers' lengths, too
    OUT.partial.jsonl    the answers so far, a batch at a time; gone when OUT is complete
    OUT.lock             held by the process that generates

OUT itself appears whole, at the end.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from uft_ds.errors import UserError
from uft_ds.evaluation.benchmarks.lengths import Lengths
from uft_ds.evaluation.benchmarks.question import Answer
from uft_ds.host.differences import differences
from uft_ds.host.files import read_regular_text, sha256, write_atomically
from uft_ds.host.formats import KEY, check_format
from uft_ds.host.locks import Held, NoLocks, acquire

FORMAT = 1
_FURTHER = (KEY, "began", "done")


class Work:
    """The files of one output, owned by this process within `taken`."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.settings_path, self._partial = _beside(out, "settings.json"), _beside(out, "partial.jsonl")
        self.began = 0.0
        """When the first of the processes began that made the answers, seconds since 1970."""

    @contextmanager
    def taken(self, settings: Mapping[str, Any], *, overwrite: bool) -> Iterator[None]:
        """Take the output for these settings; `overwrite` begins anew whatever is there.

        Raises:
            UserError: it was made, or begun, with other settings, or by something else, or another process is at it.
        """
        if self.out.is_dir():
            raise UserError(f"--out {self.out}: is a folder, expected the name of a file")
        if not self.out.parent.is_dir():
            raise UserError(f"--out {self.out}: no folder {self.out.parent}; make it first")
        try:
            lock = acquire(_beside(self.out, "lock"), needs_locks=False)
        except Held:
            raise UserError(f"--out {self.out}: another process generates into it; wait for its end") from None
        except (OSError, NoLocks) as error:
            raise UserError(f"--out {self.out}: cannot be written ({error.strerror or error})") from None
        try:
            if overwrite:
                for path in (self.settings_path, self._partial, self.out):
                    path.unlink(missing_ok=True)
            self._begin(json.loads(json.dumps(settings)))
            yield
        finally:
            lock.delete()

    def complete(self) -> Lengths | None:
        """The lengths of the answers of a complete output; None if it is not complete."""
        done = self._record().get("done")
        return Lengths.from_plain(done["lengths"]) if isinstance(done, Mapping) and self.out.exists() else None

    def answers(self) -> list[Answer]:
        """Those that are there; a last line that a kill has cut off is removed.

        Raises:
            UserError: a line cannot be read.
        """
        try:
            text = self._partial.read_bytes()
        except FileNotFoundError:
            return []
        whole = text[: text.rfind(b"\n") + 1]
        if len(whole) < len(text):
            self._partial.write_bytes(whole)
        found = []
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                found += [_answer(value) for value in json.loads(line)]
            except (ValueError, TypeError, KeyError) as error:
                raise UserError(
                    f"{self._partial}:{number}: cannot be read ({error}); delete this line: it is made again"
                ) from None
        return found

    def add(self, batch: Sequence[Answer]) -> None:
        """Keep the answers of a batch: all of them or, if the process is killed meanwhile, none."""
        with self._partial.open("ab") as file:
            file.write(json.dumps([asdict(answer) for answer in batch], ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def finish(self, text: str | Iterable[str], lengths: Lengths) -> None:
        """Write the output, and that it is complete."""
        write_atomically(self.out, text)
        done = {"sha256": sha256(self.out), "lengths": lengths.plain()}
        write_atomically(self.settings_path, json.dumps(self._record() | {"done": done}, indent=2) + "\n")
        self._partial.unlink(missing_ok=True)

    def _begin(self, settings: Mapping[str, Any]) -> None:
        stored = self._record()
        if not stored:
            if self.out.exists():
                raise UserError(
                    f"--out {self.out}: exists, without {self.settings_path.name} of `uft generate`; choose another "
                    "--out, or --overwrite"
                )
            self.began = time.time()
            record = {KEY: FORMAT, "began": self.began, **settings}
            self._partial.unlink(missing_ok=True)  # of nobody knows what
            write_atomically(self.settings_path, json.dumps(record, indent=2) + "\n")
            return
        before = {name: value for name, value in stored.items() if name not in _FURTHER}
        found = differences(before, settings)
        if found:
            raise UserError(
                f"--out {self.out}: was begun with other settings: {'; '.join(found)}. Choose another --out, or "
                "--overwrite"
            )
        done = stored.get("done")
        if isinstance(done, Mapping) and self.out.exists() and done.get("sha256") != sha256(self.out):
            raise UserError(
                f"--out {self.out}: has been changed since it was written; choose another --out, or --overwrite"
            )
        self.began = float(stored["began"])

    def _record(self) -> dict[str, Any]:
        """What the settings' file holds; nothing if there is none."""
        path = self.settings_path
        remedy = "choose another --out, or --overwrite"
        try:
            value = json.loads(read_regular_text(path))
            check_format(path, value[KEY], FORMAT, remedy)
            float(value["began"])
            return dict(value)
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise UserError(f"{path}: cannot be read ({error}); {remedy}") from None


def _beside(out: Path, name: str) -> Path:
    return out.with_name(f"{out.name}.{name}")


def _answer(value: Mapping[str, Any]) -> Answer:
    return Answer(value["key"], tuple(value["turns"]), tuple(value["tokens"]), tuple(value["are_ended"]))
