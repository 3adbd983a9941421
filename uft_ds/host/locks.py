"""Locks between processes. A lock is a file locked by `flock`; it is released when the process that holds it ends.

We do not use the `filelock` package: it cannot distinguish a held lock from a file system without locks, and it does
not delete lock files safely.
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
    """A lock file that this process holds, until it closes the lock or ends."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file = path, file

    @property
    def closed(self) -> bool:
        return self._file.closed

    def close(self) -> None:
        """Release the lock and keep the file, which the next holder uses again."""
        self._file.close()

    def delete(self) -> None:
        """Delete the file and release the lock. A process that has the file open notices this in `acquire`."""
        try:
            self._path.unlink(missing_ok=True)  # before the release: after it, the file may belong to another holder
        finally:
            self.close()

    def __enter__(self) -> Lock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def acquire(path: Path, *, wait_seconds: float | None = 0.0, needs_locks: bool = True) -> Lock:
    """Lock a file, which is created if it does not exist. Its content is neither read nor changed.

    Args:
        path: a regular file, never a link: in a folder that others may write to, a link could lead anywhere.
        wait_seconds: how long to wait for another holder; None: without limit.
        needs_locks: refuse a file system without locks. If False, the lock excludes nobody on such a file system.
    Raises:
        Held: another process held the lock during all this time.
        NoLocks: the file system has no locks.
        OSError: the file cannot be opened or locked; `strerror` is meant for the user.
    """
    deadline = None if wait_seconds is None else time.monotonic() + wait_seconds
    while True:
        # NFS implements an exclusive flock as a byte-range lock, which needs a file that is open for writing.
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
        # The holder that this process waited for may have deleted the file; a lock on a deleted file excludes nobody.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat(follow_symlinks=False)):
                return Lock(path, file)
        file.close()  # the last holder has deleted this file meanwhile: try again with the new one


def is_held(path: Path) -> bool:
    """Whether a process holds a lock. The file is not changed, and permission to read it is enough.

    The check holds a shared lock for a moment, so a process that acquires the lock must wait that long.

    Raises:
        NoLocks: the file system has no locks.
        OSError: the file cannot be opened or locked.
    """
    with _opened(path, os.O_RDONLY) as file:
        return not _try(file, fcntl.LOCK_SH | fcntl.LOCK_NB)


def _opened(path: Path, flags: int) -> BinaryIO:
    # O_NONBLOCK: opening a pipe must not wait for its other end.
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP and path.is_symlink():
            raise OSError(errno.ELOOP, f"{path.name} is a link, expected a file of its own; delete it") from None
        raise
    file = os.fdopen(descriptor, "rb", buffering=0)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        file.close()
        raise OSError(errno.EINVAL, f"{path.name} is not a regular file; delete it")
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
