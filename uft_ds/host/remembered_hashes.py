"""SHA-256 of large files, remembered until a file changes: 100 GB of weights or data take minutes to read."""

from __future__ import annotations

import hashlib
import os
import time
from contextlib import suppress
from pathlib import Path

from uft_ds.host.files import sha256, user_cache, write_atomically

SETTLED_SECONDS = 2.0
"""A file that has changed more recently is hashed, but not remembered: another change could leave the times the same.
The clocks of file systems tick every few milliseconds; some that are shared over a network, every second."""


def remembered_sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hex; read anew if the file's path, inode, size or times are other ones.

    It is kept below `uft_ds/sha256` in the user's cache. A disk that changes a byte by itself is not seen.

    Raises:
        OSError: the file cannot be read.
    """
    stat = path.stat()
    memory = user_cache() / "sha256" / hashlib.sha256(_unchanged_name(path, stat).encode()).hexdigest()
    with suppress(OSError):
        remembered = memory.read_text(encoding="utf-8")
        if len(remembered) == 64:
            return remembered
    digest = sha256(path)
    if time.time() - max(stat.st_ctime, stat.st_mtime) > SETTLED_SECONDS:
        with suppress(OSError):  # if the cache cannot be written, the next run hashes again
            memory.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(memory, digest)
    return digest


def _unchanged_name(path: Path, stat: os.stat_result) -> str:
    """A name that changes whenever the content may have changed. It includes ctime, which cannot be set back."""
    return f"{path}:{stat.st_ino}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}"
