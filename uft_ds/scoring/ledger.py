"""What a judge's replies have taken for one output, kept by the reply: a run that is cut off has paid for what it was
told."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import BinaryIO

from uft_ds.errors import UserError
from uft_ds.scoring.item import NO_TOKENS, Tokens


class Ledger:
    """A file of lines [prompt tokens, completion tokens]."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.spent = NO_TOKENS
        """What all runs for this output have asked for."""
        self._file: BinaryIO | None = None
        self._lock = threading.Lock()

    def open(self) -> None:
        """Read what earlier runs have noted; a last line that a kill has cut off is removed.

        Raises:
            UserError: the file is damaged.
        """
        try:
            text = self.path.read_bytes()
        except FileNotFoundError:
            return
        whole = text[: text.rfind(b"\n") + 1]
        if len(whole) < len(text):
            self.path.write_bytes(whole)
        try:
            self.spent = sum((Tokens(*json.loads(line)) for line in whole.splitlines()), NO_TOKENS)
        except (ValueError, TypeError) as error:
            raise UserError(f"{self.path}: cannot be read ({error}); delete its damaged lines") from None

    def add(self, tokens: Tokens) -> None:
        """Note what a reply has taken. It may be called by several threads."""
        with self._lock:
            if self._file is None:
                self._file = self.path.open("ab", buffering=0)
            self._file.write(json.dumps([tokens.prompt, tokens.completion]).encode() + b"\n")
            self.spent = self.spent + tokens

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
