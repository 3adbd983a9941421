"""A cache of token stores by content: no run tokenises a source again that another run has tokenised.

A store's name is a hash of everything that its tokens depend on: the bytes of the rows, the tokenizer, the chat
template, the rules, the package versions and our own code. So a store is never out of date, and any may be deleted.
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
from uft_ds.data.store.store_files import INDEX, check_content
from uft_ds.data.store.token_store import TokenStore
from uft_ds.data.tokens.chat_tokenizer import ChatTokenizer
from uft_ds.errors import UserError
from uft_ds.host.files import sha256
from uft_ds.host.locks import acquire

_SECONDS_OF_A_DAY = 86_400
_OF_THE_FOLDER = (
    errno.EACCES, errno.EDQUOT, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOSPC, errno.ENOTDIR, errno.EPERM,
    errno.EROFS,
)  # fmt: skip
"""Errors that are caused by the cache folder, which the user can change."""
_PACKAGES = ("transformers", "tokenizers", "jinja2", "sentencepiece")
KEY_PARTS = "key.json"
_DATA = Path(__file__).parents[1]
_FROM_ROW_TO_TOKENS = ("formats/*.py", "rows/*.py", "tokens/*.py", "store/*.py", "example.py", "score_map.py")
"""Our modules that decide which tokens a row becomes."""


def store_key(data: SourceFiles, rules: RowRules, chat: ChatTokenizer) -> str:
    """The name of a source's store: a content hash, 32 hex digits."""
    return _key_of(key_parts(data, rules, chat))


def key_parts(data: SourceFiles, rules: RowRules, chat: ChatTokenizer) -> dict[str, Any]:
    """Everything that a source's tokens depend on, as plain values; the store keeps a copy of them."""
    ours = sorted(file for pattern in _FROM_ROW_TO_TOKENS for file in _DATA.glob(pattern))
    return {
        "content": content_hash(data),
        "rules": asdict(rules),
        "chat_template": _sha256(json.dumps(chat.tokenizer.chat_template, sort_keys=True)),
        "tokenizer": chat.content_hash,
        "placeholders": list(chat.placeholders),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "code": [sha256(file) for file in (*ours, *_plugin_files(rules.format))],
    }


def _key_of(parts: Mapping[str, Any]) -> str:
    return _sha256(json.dumps(parts, sort_keys=True))[:32]


def read_key_parts(cache_dir: Path, key: str) -> dict[str, Any]:
    """The `key_parts` that a store was built from.

    Raises:
        UserError: the file cannot be read.
    """
    path = cache_dir / key / KEY_PARTS
    try:
        parts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if _key_of(parts) != key:
            raise ValueError("its content is not what was written")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error}); delete {path.parent}, it is built again") from None
    return parts


def _plugin_files(name: str) -> list[Path]:
    """All modules of the package that provides a format; none for a built-in format."""
    if name in FORMATS:
        return []
    package = sys.modules[format_named(name).__module__.partition(".")[0]]
    file = Path(str(package.__file__))
    return sorted(file.parent.rglob("*.py")) if hasattr(package, "__path__") else [file]


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
    """Tokenise a source, unless its store exists. If several processes need the same store, one builds it, others wait.

    Returns:
        the store's key, which is the name of its folder in `cache_dir`.
    Raises:
        UserError: a bad row, a store whose files have changed since they were written, or a folder that cannot be
            written; no partial store is left behind.
    """
    key = store_key(data, rules, chat)
    folder = cache_dir / key
    if is_whole(folder):
        check_content(folder)  # all runs of many months share it, and a flipped bit would be another token
        return key
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # below /proc it is "No such file or directory"
        raise _cannot_be_written(cache_dir, error) from None
    try:
        # If the file system has no locks, two processes may do the same work; the store of the first one is kept.
        with acquire(cache_dir / f".{key}.lock", wait_seconds=None, needs_locks=False):
            if not is_whole(folder):  # checked again: another process may have built it before this one got the lock
                _build_beside(folder, data, rules, chat, quarantine, workers, on_progress)
    except OSError as error:
        if error.errno not in _OF_THE_FOLDER:
            raise
        raise _cannot_be_written(cache_dir, error) from None
    return key


def _cannot_be_written(cache_dir: Path, error: OSError) -> UserError:
    return UserError(
        f"data.cache_dir: {cache_dir} cannot be written ({error.strerror}); give another folder with room for "
        "4 bytes per token"
    )


def open_store(cache_dir: Path, key: str, label: str, names: tuple[str, ...] | None = None) -> TokenStore:
    """Open a store by its key.

    Raises:
        UserError: the store does not exist, or is damaged.
    """
    folder = cache_dir / key
    if not is_whole(folder):
        raise UserError(f"{label}: its tokens are not in {cache_dir} any more ({key}); start a new run")
    return TokenStore(folder, label, names)


def is_whole(folder: Path) -> bool:
    """Whether a store is complete: the index is written last, and then the folder is renamed."""
    return (folder / INDEX).is_file()


def quarantine_file(store: TokenStore) -> Path:
    """The file of the rows that were left out of a store, with the reasons."""
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
        # Hashed again after reading: the files may have changed meanwhile, and the key must describe these tokens.
        parts = key_parts(data, rules, chat)
        if _key_of(parts) != folder.name:
            raise UserError(
                f"{data.label}: changed while it was read (or the tokenizer, or uft_ds itself); start again"
            )
        (temporary / KEY_PARTS).write_text(json.dumps(parts, indent=2) + "\n", encoding="utf-8")
        if folder.exists() and not is_whole(folder):  # a damaged store is in the way of the rename
            folder.rename(temporary / "damaged")
        temporary.rename(folder)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY) or not is_whole(folder):
            raise
        # Another process, which the lock does not reach, has built the store first.
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(folder / "damaged", ignore_errors=True)


def _clear_away(folder: Path) -> None:
    """Delete partial stores of killed processes: those of this machine at once, those of others after a day.

    Whether a process of another machine still runs cannot be seen from here.
    """
    for left in folder.parent.glob(f".{folder.name}.*.tmp"):
        host, _, process_id = left.name.removeprefix(f".{folder.name}.").removesuffix(".tmp").rpartition(".")
        is_here = host == socket.gethostname()
        is_old = time.time() - left.stat().st_mtime > _SECONDS_OF_A_DAY
        if (is_here and not Path(f"/proc/{process_id}").exists()) or is_old:
            shutil.rmtree(left, ignore_errors=True)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
