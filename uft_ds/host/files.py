"""Files that are whole or absent, their hashes, and where caches live."""

from __future__ import annotations

import hashlib
import os
import uuid
from pathlib import Path

from uft_ds.errors import UserError


def write_atomically(path: Path, text: str) -> None:
    """The whole text or nothing, also beside other writers: written beside, synced, renamed."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """A file, or the names in a folder, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def user_cache() -> Path:
    """`uft_ds` under the user's cache folder: XDG_CACHE_HOME, or ~/.cache.

    Raises:
        UserError: neither is set, as in a container without a home.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "uft_ds"
    except RuntimeError:
        raise UserError("no home folder for caches; set XDG_CACHE_HOME to a folder that can be written") from None
