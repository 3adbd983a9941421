"""Tokenised sources, kept by content: what was tokenised once is never tokenised again, by any run.

A store's name is a hash over all that its tokens depend on: the rows' bytes, the tokenizer, the chat template, the
rules, the versions and our own code. So nothing is ever out of date, and everything may be deleted.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from uft_ds.data.formats.table import FORMATS, format_named
from uft_ds.data.rows.reading import SourceFiles, content_hash
from uft_ds.data.store.building import QUARANTINE, RowRules, build_store
from uft_ds.data.store.sequences import INDEX, TokenStore
from uft_ds.data.tokens.chat_tokenizer import ChatTokenizer
from uft_ds.errors import UserError
from uft_ds.host.files import sha256
from uft_ds.host.locks import acquire

_SECONDS_OF_A_DAY = 86_400
_OF_THE_FOLDER = (
    errno.EACCES, errno.EDQUOT, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOSPC, errno.ENOTDIR, errno.EPERM,
    errno.EROFS,
)  # fmt: skip
_PACKAGES = ("transformers", "tokenizers", "jinja2", "sentencepiece")
KEY_PARTS = "key.json"
_DATA = Path(__file__).parents[1]
_FROM_ROW_TO_TOKENS = ("formats/*.py", "rows/*.py", "tokens/*.py", "store/*.py", "example.py", "score_map.py")
"""Our modules that decide what a row's tokens are."""


def store_key(data: SourceFiles, rules: RowRules, chat: ChatTokenizer) -> str:
    """The name of a source's store, by content; hex."""
    return _key_of(key_parts(data, rules, chat))


def key_parts(data: SourceFiles, rules: RowRules, chat: ChatTokenizer) -> dict[str, Any]:
    """All that a source's tokens depend on, by content: plain values, which a store keeps to say what it is of."""
    ours = sorted(file for pattern in _FROM_ROW_TO_TOKENS for file in _DATA.glob(pattern))
    return {
        "content": content_hash(data),
        "rules": asdict(rules),
        "chat_template": _sha256(json.dumps(chat.tokenizer.chat_template, sort_keys=True)),
        "tokenizer": tokenizer_hash(chat),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "code": [sha256(file) for file in (*ours, *_plugin_files(rules.format))],
    }


def _key_of(parts: Mapping[str, Any]) -> str:
    return _sha256(json.dumps(parts, sort_keys=True))[:32]


def read_key_parts(cache_dir: Path, key: str) -> dict[str, Any]:
    """What a store is of.

    Raises:
        UserError: it does not say.
    """
    path = cache_dir / key / KEY_PARTS
    try:
        parts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); delete {path.parent}, it is made anew") from None
    return parts


def _plugin_files(name: str) -> list[Path]:
    """All modules of the package that another's format stands in; none for our own."""
    if name in FORMATS:
        return []
    package = sys.modules[format_named(name).__module__.partition(".")[0]]
    file = Path(str(package.__file__))
    return sorted(file.parent.rglob("*.py")) if hasattr(package, "__path__") else [file]


def tokenizer_hash(chat: ChatTokenizer) -> str:
    """What a tokenizer and its template make of a text, by content; hex."""
    tokenizer = chat.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = json.dumps(tokenizer.get_vocab(), sort_keys=True) if backend is None else backend.to_str()
    template = json.dumps(tokenizer.chat_template, sort_keys=True)
    return _sha256("\0".join([vocabulary, json.dumps(tokenizer.special_tokens_map), template]))


def ensure_store(
    data: SourceFiles,
    rules: RowRules,
    chat: ChatTokenizer,
    cache_dir: Path,
    *,
    quarantine: bool,
    workers: int | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> str:
    """Tokenise a source unless it has been; of several processes that want the same one, one works and the rest wait.

    Returns:
        the store's key: it is the folder of that name below `cache_dir`.
    Raises:
        UserError: a bad row, or a folder that cannot be written; nothing is left behind.
    """
    key = store_key(data, rules, chat)
    folder = cache_dir / key
    if is_whole(folder):
        return key
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        # Where the file system has no locks, two processes do the same work, and the first to end is taken.
        with acquire(cache_dir / f".{key}.lock", wait_seconds=None, needs_locks=False):
            if not is_whole(folder):
                _build_beside(folder, data, rules, chat, quarantine, workers, on_progress)
    except OSError as error:
        if error.errno not in _OF_THE_FOLDER:
            raise
        raise UserError(
            f"data.cache_dir: {cache_dir} cannot be written ({error.strerror}); give another folder with room for "
            "4 bytes a token"
        ) from None
    return key


def open_store(cache_dir: Path, key: str, label: str, names: tuple[str, ...] | None = None) -> TokenStore:
    """A store by its key.

    Raises:
        UserError: it is not there, or damaged.
    """
    folder = cache_dir / key
    if not is_whole(folder):
        raise UserError(f"{label}: its tokens are not in {cache_dir} any more ({key}); start the run anew")
    return TokenStore(folder, label, names)


def is_whole(folder: Path) -> bool:
    """Whether a store is there: the index is written last, and the folder then renamed."""
    return (folder / INDEX).is_file()


def quarantine_file(store: TokenStore) -> Path:
    """The rows that were left out of a store, and why."""
    return store.folder / QUARANTINE


def _build_beside(
    folder: Path,
    data: SourceFiles,
    rules: RowRules,
    chat: ChatTokenizer,
    quarantine: bool,
    workers: int | None,
    on_progress: Callable[[int, int], None],
) -> None:
    _clear_away(folder)
    temporary = folder.with_name(f".{folder.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        build_store(temporary, data, rules, chat, quarantine=quarantine, workers=workers, on_progress=on_progress)
        parts = key_parts(data, rules, chat)
        if _key_of(parts) != folder.name:
            raise UserError(
                f"{data.label}: changed while it was read (or the tokenizer, or uft_ds itself); start again"
            )
        (temporary / KEY_PARTS).write_text(json.dumps(parts, indent=2) + "\n", encoding="utf-8")
        if folder.exists() and not is_whole(folder):  # damaged
            folder.rename(temporary / "damaged")
        temporary.rename(folder)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY) or not is_whole(folder):
            raise
        # Another process was first, where locks do not reach it.
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(folder / "damaged", ignore_errors=True)


def _clear_away(folder: Path) -> None:
    """What killed processes have left: of this machine at once, of others after a day."""
    for left in folder.parent.glob(f".{folder.name}.*.tmp"):
        host, _, process_id = left.name.removeprefix(f".{folder.name}.").removesuffix(".tmp").rpartition(".")
        is_here = host == socket.gethostname()
        is_old = time.time() - left.stat().st_mtime > _SECONDS_OF_A_DAY
        if (is_here and not Path(f"/proc/{process_id}").exists()) or is_old:
            shutil.rmtree(left, ignore_errors=True)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
