"""Atomic writes, hashes of files, and the folder of caches."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import uuid
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from uft_ds.errors import UserError


def write_atomically(path: Path, text: str | Iterable[str]) -> None:
    """Write a text so that a reader finds the old file or the new one, never a part, also with several writers.

    The text is written to a temporary file in the same folder, synced and renamed.

    Args:
        text: all of it, or its parts, which are made as they are written.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines([text] if isinstance(text, str) else text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_regular_text(path: Path) -> str:
    """The text of a file. A pipe or a device is refused: reading it could wait for ever, or never end.

    Raises:
        OSError: it cannot be read, or is not a regular file. UnicodeDecodeError: it is not UTF-8.
    """
    # Opening a pipe must not wait for its other end either.
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), encoding="utf-8") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        return file.read()


def is_below(name: str) -> bool:
    """Whether a name in a list of a folder's files stays below that folder: no `..`, no absolute path."""
    path = PurePosixPath(name)
    return name not in ("", ".") and "\0" not in name and not path.is_absolute() and ".." not in path.parts


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def user_cache() -> Path:
    """The folder `uft_ds` in the user's cache folder: XDG_CACHE_HOME, or ~/.cache.

    Raises:
        UserError: XDG_CACHE_HOME is not set and there is no home folder, as in some containers.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "uft_ds"
    except RuntimeError:
        raise UserError("no home folder for caches; set XDG_CACHE_HOME to a folder that can be written") from None
