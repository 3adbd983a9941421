"""The folder of a judgement while it is made, and beside its results afterwards.

    settings.json       the answers, the questions, the prompts and the judge
    spent.jsonl         [prompt tokens, completion tokens] of each reply, as soon as it has come
    judgements.jsonl    each judgement with its value or the reason why there is none, and the judge's words
    results.json        written last (`evaluation/results.py`): a folder with it is complete

Replies themselves are kept by `scoring/replies.py`, so a judgement that was interrupted asks for nothing twice.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from uft_ds.errors import UserError
from uft_ds.evaluation.results import RESULTS
from uft_ds.host.differences import differences
from uft_ds.host.files import read_regular_text, write_atomically
from uft_ds.host.formats import KEY, check_format
from uft_ds.host.locks import Held, NoLocks, acquire
from uft_ds.scoring.item import Judgement
from uft_ds.scoring.ledger import Ledger
from uft_ds.scoring.replies import encodable_json

FORMAT = 1
JUDGEMENTS = "judgements.jsonl"


class Record:
    """The folder of one judgement, owned by this process within `taken`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ledger = Ledger(folder / "spent.jsonl")

    @contextmanager
    def taken(self, settings: Mapping[str, Any]) -> Iterator[None]:
        """Take the folder for these settings.

        Raises:
            UserError: it is of other settings or of something else, or another process is at it.
        """
        self.check(settings)
        is_new = not self.folder.exists()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = acquire(self.folder / "lock", needs_locks=False)
        except Held:
            raise UserError(f"--out {self.folder}: another process judges into it; wait for its end") from None
        except (OSError, NoLocks) as error:
            raise UserError(f"--out {self.folder}: cannot be written ({error.strerror or error})") from None
        try:
            self.check(settings)  # anew: another process may have begun meanwhile
            if not self._settings.exists():
                write_atomically(self._settings, json.dumps({KEY: FORMAT, **settings}, indent=2) + "\n")
            self.ledger.open()
            yield
        finally:
            self.ledger.close()
            if is_new and not (self.ledger.path.exists() or self._judgements.exists() or self.is_complete):
                self._settings.unlink(missing_ok=True)  # nothing was asked: a slip leaves nothing behind
                lock.delete()
                with suppress(OSError):
                    self.folder.rmdir()
            else:
                lock.delete()

    def check(self, settings: Mapping[str, Any]) -> None:
        """Refuse a folder of other settings, or of something else; nothing is written."""
        remedy = "choose another --out"
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"--out {self.folder}: is no folder; {remedy}")
        if not self._settings.exists():
            if self.folder.is_dir() and any(path.name != "lock" for path in self.folder.iterdir()):
                raise UserError(f"--out {self.folder}: is not empty, and `uft judge` has not written it; {remedy}")
            return
        try:
            stored = json.loads(read_regular_text(self._settings))
            check_format(self._settings, stored.pop(KEY), FORMAT, remedy)
        except (OSError, ValueError, LookupError, AttributeError) as error:
            raise UserError(f"{self._settings}: cannot be read ({error}); {remedy}") from None
        found = differences(stored, json.loads(json.dumps(settings)))
        if found:
            raise UserError(f"--out {self.folder}: was judged differently: {'; '.join(found)}; {remedy}")

    @property
    def is_complete(self) -> bool:
        return (self.folder / RESULTS).exists()

    def write_judgements(self, named: Sequence[tuple[Mapping[str, Any], Judgement]]) -> None:
        """Write all judgements, each with what says of which answer it is."""
        lines = (
            encodable_json(
                {**of, "value": one.value, "reason": one.reason, "notes": list(one.notes), "reply": one.reply}
            )
            + "\n"
            for of, one in named
        )
        write_atomically(self._judgements, lines)

    def missing(self) -> list[str]:
        """Why judgements are missing, of all that were written.

        Raises:
            UserError: the file cannot be read.
        """
        try:
            lines = read_regular_text(self._judgements).split("\n")
            found = [json.loads(line) for line in lines if line]
            return [str(one["reason"]) for one in found if one["value"] is None]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise UserError(f"{self._judgements}: cannot be read ({error}); choose another --out") from None

    def unfinish(self) -> None:
        """From now on the folder is not complete."""
        (self.folder / RESULTS).unlink(missing_ok=True)

    @property
    def _settings(self) -> Path:
        return self.folder / "settings.json"

    @property
    def _judgements(self) -> Path:
        return self.folder / JUDGEMENTS
