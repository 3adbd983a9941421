"""Locks between processes: a file each, locked by `flock`, which ends with the process that holds it.

Own code, and not the `filelock` package: that one cannot tell a lock that is held from a file system that has no
locks, and deletes nothing safely.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
_SECONDS_BETWEEN_TRIES = 0.05


class Held(Exception):
    """Another process holds the lock."""


class NoLocks(OSError):
    """The file system has no locks: NFS mounted with `nolock`, Lustre without `flock`, some FUSE file systems."""


class Lock:
    """A lock file that this process has locked, until it is closed or the process ends."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file = path, file

    @property
    def closed(self) -> bool:
        return self._file.closed

    def close(self) -> None:
        """Give the lock back, and leave the file: the next holder uses it again."""
        self._file.close()

    def delete(self) -> None:
        """Delete the file and give the lock back. A process that has the file open finds that out in `acquire`."""
        try:
            self._path.unlink(missing_ok=True)  # while it is held: afterwards it may be another holder's
        finally:
            self.close()

    def __enter__(self) -> Lock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def acquire(path: Path, *, wait_seconds: float | None = 0.0, needs_locks: bool = True) -> Lock:
    """Lock a file, which is created where there is none. Its content is never read nor changed.

    Args:
        path: a regular file, never a link: in a folder that others may write, a link would lead anywhere.
        wait_seconds: for a process that holds it; None waits as long as it does.
        needs_locks: refuse a file system without locks. False: there, nobody else is kept out.
    Raises:
        Held: another process holds it, and has not given it back in that time.
        NoLocks: the file system has no locks.
        OSError: the file cannot be opened or locked; `strerror` is for the user.
    """
    deadline = None if wait_seconds is None else time.monotonic() + wait_seconds
    while True:
        # For writing: NFS does an exclusive flock as a byte-range lock, and refuses one on a file open for reading.
        file = _opened(path, os.O_RDWR | os.O_CREAT)
        try:
            if not _is_locked(file, deadline):
                raise Held(f"{path}: another process holds this lock")
        except NoLocks:
            if needs_locks:
                file.close()
                raise
            return Lock(path, file)
        except BaseException:
            file.close()
            raise
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat(follow_symlinks=False)):
                return Lock(path, file)
        file.close()  # its last holder has deleted it meanwhile


def is_held(path: Path) -> bool:
    """Whether a process holds a lock; `path` is left as it is, and reading is enough.

    The look itself holds the lock for a moment, shared with other looks: who acquires it must wait that long.

    Raises:
        NoLocks: the file system has no locks. OSError: the file cannot be opened or locked.
    """
    with _opened(path, os.O_RDONLY) as file:
        return not _try(file, fcntl.LOCK_SH | fcntl.LOCK_NB)


def _opened(path: Path, flags: int) -> BinaryIO:
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP and path.is_symlink():
            raise OSError(errno.ELOOP, f"{path.name} is a link, expected a file of its own; delete it") from None
        raise
    file = os.fdopen(descriptor, "rb", buffering=0)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        file.close()
        raise OSError(errno.EINVAL, f"{path.name} is no regular file; delete it")
    return file


def _is_locked(file: BinaryIO, deadline: float | None) -> bool:
    if deadline is None:
        return _try(file, fcntl.LOCK_EX)
    while not _try(file, fcntl.LOCK_EX | fcntl.LOCK_NB):
        if time.monotonic() >= deadline:
            return False
        time.sleep(_SECONDS_BETWEEN_TRIES)
    return True


def _try(file: BinaryIO, operation: int) -> bool:
    try:
        fcntl.flock(file, operation)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS:
            raise NoLocks(error.errno, f"no file locks there: {os.strerror(error.errno)}") from None
        raise
    return True
