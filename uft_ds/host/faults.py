"""What a command says of an exception that none of its parts explained, and the exit code.

What can be foreseen of files, disks and memory is the user's to mend. The rest is a fault of uft_ds, whose traceback is
kept in a file.
"""

from __future__ import annotations

import errno
import os
import tempfile
import traceback
from pathlib import Path

from uft_ds.errors import EXIT_BAD_INPUT, EXIT_CRASHED
from uft_ds.host.terminal import in_one_line

_OF_A_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EPIPE, errno.EBADF)
_LASTING = frozenset((
    errno.EACCES, errno.EDQUOT, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOENT, errno.ENOSPC,
    errno.ENOTDIR, errno.EPERM, errno.EROFS,
))  # fmt: skip
"""Errors of files that another start meets again. Others may pass, as those of a network's file system."""
_SHOWN_LETTERS = 80
"""Longest name that a message shows whole."""
_ALLOCATOR = "DefaultCPUAllocator"
"""Begins the message of torch's RuntimeError where the host's memory is not enough."""


def foreseen(error: BaseException) -> str | None:
    """One line on an error of a file, a disk or the memory, which names the file; None for any other error."""
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        # Wherever a path of the user's is looked at: pathlib answers other impossible paths by "does not exist".
        return _too_long(str(error.filename or ""), str(error.strerror))
    if isinstance(error, OSError) and error.filename is not None:
        names = (error.filename, *(() if error.filename2 is None else (error.filename2,)))
        where = " -> ".join(os.fsdecode(name) if isinstance(name, str | bytes) else str(name) for name in names)
        return f"{where}: {error.strerror or error}"
    if isinstance(error, OSError) and error.errno in _OF_A_DISK:  # a write does not know its file's name
        return f"standard output, or a file that was being written: {error.strerror}"
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _ALLOCATOR in str(error)):
        said = str(error).strip().splitlines()
        return f"the memory of this machine is not enough{f' ({in_one_line(said[-1], 200)})' if said else ''}"
    return None


def lasting(error: BaseException) -> str | None:
    """One line on an error of a file that a restart would not mend; None for any other error."""
    return foreseen(error) if isinstance(error, OSError) and error.errno in _LASTING else None


def _too_long(name: str, reason: str) -> str:
    begins = name if len(name) <= _SHOWN_LETTERS else f"{name[:_SHOWN_LETTERS]}..."
    longest = max((len(os.fsencode(part)) for part in Path(name).parts), default=0)
    return (
        f"{begins}: no such file or folder, and none can be made ({reason}: {longest} bytes in one name, "
        f"{len(os.fsencode(name))} in all; file systems take 255, and 4096)"
    )


def ending(error: Exception) -> tuple[int, str]:
    """The exit code and the message of an exception that ends a command.

    The traceback of a fault of ours is written to a new file in the folder of temporary files.
    """
    message = foreseen(error)
    if message is not None:
        return EXIT_BAD_INPUT, message
    text = "".join(traceback.format_exception(error))
    said = str(error).strip().splitlines()
    what = f"{type(error).__name__}: {in_one_line(said[0], 300)}" if said else type(error).__name__
    try:
        descriptor, path = tempfile.mkstemp(prefix="uft-traceback-", suffix=".txt")
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
    except OSError:
        return EXIT_CRASHED, f"{what}: this is a fault of uft_ds; please report it with this traceback:\n{text}"
    return EXIT_CRASHED, f"{what}: this is a fault of uft_ds; please report it with the traceback in {path}"
