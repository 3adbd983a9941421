"""Warnings of libraries: each is written once in a log, and one that no user can heed is not written."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def each_once() -> Iterator[None]:
    """Within the block, a warning with the same text at the same line of code is shown only the first time.

    The filter "once" does not do that: Python forgets what it has shown whenever any code enters or leaves
    `warnings.catch_warnings`, which torch does in every step. A log of 30 steps had 39 copies of one warning.
    """
    shown: set[tuple[type[Warning], str, str, int]] = set()
    before = warnings.showwarning

    def show(message: Any, category: type[Warning], filename: str, lineno: int, *rest: Any, **named: Any) -> None:
        key = (category, str(message), filename, lineno)
        if key not in shown:
            shown.add(key)
            before(message, category, filename, lineno, *rest, **named)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before


def quiet_bitsandbytes() -> None:
    """From now on bitsandbytes does not tell that it lacks a kernel for inference, which nothing here would call.

    It does when it is imported (0.50.2), which other libraries do in every process where it is installed, on CPUs with
    AVX512-BF16.
    """
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
