"""The folder beside an output, `OUT.scoring/`: what was scored by what, and each judgement as soon as it was made.

    identity.json     the input and the scorer
    judgements.jsonl  one line for each row that was scored; of two lines for a row the later one counts
    spent.jsonl       [prompt tokens, completion tokens] of each reply of a judge, as soon as it has come
    failures.jsonl    answers without a score, with their places and reasons
    quarantine.jsonl  bad rows that were left out, likewise
    summary.json      written last, with the SHA-256 of the output: an output with it is complete

The output is made of the input and the judgements alone, so a run that was killed at any moment goes on to the same
bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from uft_ds.errors import UserError
from uft_ds.host.differences import differences
from uft_ds.host.files import sha256, write_atomically
from uft_ds.host.formats import KEY, check_format
from uft_ds.host.locks import Held, Lock, NoLocks, acquire
from uft_ds.scoring.item import NO_TOKENS, Judgement, Tokens
from uft_ds.scoring.ledger import Ledger
from uft_ds.scoring.replies import encodable_json
from uft_ds.scoring.rows import Row

FORMAT = 1
FAILURES, QUARANTINE, SPENT = "failures.jsonl", "quarantine.jsonl", "spent.jsonl"


@dataclass(frozen=True)
class Scored:
    """The judgements of one row: its key, and one value or None for each answer."""

    key: str
    values: tuple[float | None, ...]
    reasons: tuple[str, ...]
    notes: tuple[str, ...]
    remembered: Tokens

    @property
    def has_failed(self) -> bool:
        return None in self.values


class Record:
    """The folder of one output, owned by this process."""

    def __init__(self, out: Path) -> None:
        """
        Raises:
            UserError: the folder cannot be made, or another process scores into it.
        """
        self.out, self.folder = out, out.with_name(out.name + ".scoring")
        self._lock: Lock | None = None
        self._log: BinaryIO | None = None
        self._ledger = Ledger(self.folder / SPENT)

    def open(self, identity: Mapping[str, Any]) -> dict[int, Scored]:
        """Take the folder for this input and scorer.

        Returns:
            the judgements that are there, by the row's number.
        Raises:
            UserError: the folder, or the output, is of another input or scorer; nothing has been changed.
        """
        self._check(identity)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = acquire(self.folder / "lock", needs_locks=False)
        except Held:
            raise UserError(f"{self.folder}: another process scores into it; wait for its end") from None
        except (OSError, NoLocks) as error:
            raise UserError(f"{self.folder}: cannot be written ({error.strerror or error})") from None
        self._check(identity)  # anew: the folder may have been made meanwhile
        if not self._identity.exists():
            write_atomically(self._identity, json.dumps({KEY: FORMAT, **identity}, indent=2))
        self._ledger.open()
        return self._judgements()

    def peek(self, identity: Mapping[str, Any]) -> dict[int, Scored]:
        """The judgements that are there; nothing is written. Raises as `open`."""
        self._check(identity)
        return self._judgements(mend=False) if self._log_path.exists() else {}

    def add(self, row: Row, judgements: Sequence[Judgement]) -> Scored:
        """Write the judgements of one row. They outlive this process from `flush` on."""
        assert self._lock is not None
        if self._log is None:
            self._log = self._log_path.open("ab")
        line = {"row": row.number, "key": row.key, "place": row.place, "judgements": [_plain(j) for j in judgements]}
        self._log.write(encodable_json(line).encode() + b"\n")
        return _scored(row.key, judgements)

    def add_spent(self, tokens: Tokens) -> None:
        """Note what a reply has taken. It may be called by several threads."""
        self._ledger.add(tokens)

    @property
    def spent(self) -> Tokens:
        """What all runs for this output have asked for."""
        return self._ledger.spent

    def flush(self) -> None:
        if self._log is not None:
            self._log.flush()

    def sync(self) -> None:
        """Flush to the disk."""
        if self._log is not None:
            self._log.flush()
            os.fsync(self._log.fileno())

    def close(self) -> None:
        """Release the folder; where nothing has been scored it is removed, so a slip leaves nothing behind."""
        self._ledger.close()
        if self._log is not None:
            self._log.close()
        if self._lock is None:
            return
        if self._log_path.exists() or self._summary.exists() or self._ledger.path.exists():
            self._lock.close()
            return
        for name in (FAILURES, QUARANTINE):
            (self.folder / name).unlink(missing_ok=True)
        self._identity.unlink(missing_ok=True)
        self._lock.delete()
        with suppress(OSError):  # another process may have begun, or a user has put something there
            self.folder.rmdir()

    def write_lines(self, name: str, lines: Sequence[Mapping[str, Any]]) -> None:
        """Write one of the lists beside the output; an empty one is no file."""
        if not lines:
            (self.folder / name).unlink(missing_ok=True)
            return
        write_atomically(self.folder / name, "".join(encodable_json(line) + "\n" for line in lines))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Mark the output as complete."""
        write_atomically(self._summary, json.dumps({**summary, "out_sha256": sha256(self.out)}, indent=2))

    def unfinish(self) -> None:
        """From now on the output is not complete."""
        self._summary.unlink(missing_ok=True)

    def summary(self) -> dict[str, Any] | None:
        """The summary of a complete output; None if it is not complete."""
        try:
            value: dict[str, Any] = json.loads(self._summary.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return value if isinstance(value, dict) and self.out.exists() else None

    @property
    def _identity(self) -> Path:
        return self.folder / "identity.json"

    @property
    def _log_path(self) -> Path:
        return self.folder / "judgements.jsonl"

    @property
    def _summary(self) -> Path:
        return self.folder / "summary.json"

    def _check(self, identity: Mapping[str, Any]) -> None:
        remedy = f"choose another --out, or delete {self.out} and {self.folder}"
        if self.out.is_dir():
            raise UserError(f"--out {self.out}: is a folder, expected the name of a file")
        if not self.out.parent.is_dir():
            raise UserError(f"--out {self.out}: no folder {self.out.parent}; make it first")
        if not self._identity.exists():
            if self.out.exists():
                raise UserError(f"--out {self.out}: exists, and `uft score` has not written it; choose another --out")
            return
        try:
            stored = json.loads(self._identity.read_text(encoding="utf-8"))
            check_format(self._identity, stored.pop(KEY), FORMAT, remedy)
        except (OSError, ValueError, LookupError, AttributeError) as error:
            raise UserError(f"{self._identity}: cannot be read ({error}); {remedy}") from None
        found = differences(stored, json.loads(json.dumps(identity)))
        if found:
            raise UserError(f"--out {self.out}: was scored differently: {'; '.join(found)}. {remedy}")
        summary = self.summary()
        # Without a summary a kill has come between the renaming of the output and the summary.
        if summary is not None and summary.get("out_sha256") != sha256(self.out):
            raise UserError(f"--out {self.out}: has been changed since it was written; {remedy}")

    def _judgements(self, *, mend: bool = True) -> dict[int, Scored]:
        """All whole lines; a last line that a kill has cut off is removed."""
        found: dict[int, Scored] = {}
        whole = 0
        try:
            with self._log_path.open("rb") as file:
                for number, line in enumerate(file, start=1):
                    if not line.endswith(b"\n"):
                        break
                    whole += len(line)
                    try:
                        value = json.loads(line)
                        judgements = [_judgement(one) for one in value["judgements"]]
                        found[value["row"]] = _scored(value["key"], judgements)
                    except (ValueError, LookupError, TypeError) as error:
                        raise UserError(
                            f"{self._log_path}:{number}: cannot be read ({error}); delete this line: its row is scored "
                            "again"
                        ) from None
            if mend and whole < self._log_path.stat().st_size:
                with self._log_path.open("rb+") as file:
                    file.truncate(whole)
        except FileNotFoundError:
            return {}
        return found


def _scored(key: str, judgements: Sequence[Judgement]) -> Scored:
    return Scored(
        key,
        tuple(judgement.value for judgement in judgements),
        tuple(judgement.reason for judgement in judgements),
        tuple(note for judgement in judgements for note in judgement.notes),
        sum((judgement.remembered for judgement in judgements), NO_TOKENS),
    )


def _plain(judgement: Judgement) -> dict[str, Any]:
    """Without what is empty."""
    said = asdict(judgement).items()
    return {name: value for name, value in said if name == "value" or value not in ("", (), asdict(Tokens()))}


def _judgement(value: Mapping[str, Any]) -> Judgement:
    return Judgement(
        value["value"],
        value.get("reason", ""),
        value.get("reply", ""),
        Tokens(**value.get("spent", {})),
        Tokens(**value.get("remembered", {})),
        tuple(value.get("notes", ())),
    )
