"""Standard streams that are closed, cannot hold a letter, or have no width: what is printed then, and where."""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from pathlib import Path


def prepare_streams() -> None:
    """Make standard input, output and error usable, whatever this process was started with.

    A closed one (`>&-`) is opened on /dev/null, for child processes too: otherwise the next file that is opened would
    take its number, and what is printed would go there. A letter that an output cannot hold is written as `\\u27e6`,
    and bytes of the input that are none of its letters arrive as they do on the command line, as lone surrogates.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number, which is this one
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115
        elif mode == "w" and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
        elif mode == "r" and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="surrogateescape")


def drop_useless_size() -> None:
    """Forget a width or height of 0, which a pseudo terminal without a size hands on: nothing would be printed."""
    for name in ("COLUMNS", "LINES"):
        given = os.environ.get(name)
        if given is not None and not (given.isdecimal() and int(given) > 0):
            del os.environ[name]


def is_terminal() -> bool:
    """Whether standard output is a terminal; not where it is closed."""
    return sys.stdout is not None and sys.stdout.isatty()


class LastingOutput(io.TextIOWrapper):
    """A text output whose reader may go away: what cannot be written is lost, and its writer goes on.

    A run outlives the terminal or the pipe (`uft train | head`) that it prints to; its log has everything.
    """

    def write(self, text: str, /) -> int:
        """Write a text, or lose it."""
        with suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        """Flush what can be flushed."""
        with suppress(OSError):
            super().flush()
