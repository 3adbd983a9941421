"""Replies of judges, kept by the content of what was asked, so that nothing is asked twice, in this run or another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uft_ds.host.files import write_atomically
from uft_ds.scoring.item import Tokens


@dataclass(frozen=True)
class Kept:
    """A reply with a verdict. nonce: the name that the verdict was asked under."""

    nonce: str
    text: str
    tokens: Tokens
    model: str


class Replies:
    """A folder of replies, one file each. Several runs may use it at the same time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(self, key: str) -> Kept | None:
        """The reply that is kept for a key; a file that cannot be read is as none."""
        try:
            value = json.loads(self._path(key).read_text(encoding="utf-8"))
            tokens = Tokens(int(value["prompt_tokens"]), int(value["completion_tokens"]))
            return Kept(str(value["nonce"]), str(value["text"]), tokens, str(value["model"]))
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            return None

    def keep(self, key: str, reply: Kept) -> None:
        """Keep a reply. A folder that cannot be written costs the next run its requests, not this one its scores."""
        path = self._path(key)
        value = {
            "nonce": reply.nonce,
            "text": reply.text,
            "prompt_tokens": reply.tokens.prompt,
            "completion_tokens": reply.tokens.completion,
            "model": reply.model,
        }
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, encodable_json(value))

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"


def encodable_json(value: Any) -> str:
    """JSON that UTF-8 can hold. Half of a surrogate pair, which a reply or an exception may hold, stays an escape."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()


def request_key(url: str, body: Mapping[str, Any], question: str) -> str:
    """The name of a request: a hash of all that it says, with one name in place of the drawn one."""
    said = json.dumps([url, dict(body), question], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(said.encode("utf-8", "surrogatepass")).hexdigest()
