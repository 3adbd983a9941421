"""Run another program that may be missing, broken or slow."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

_SECONDS = 20


def output_of(command: Sequence[str]) -> str | None:
    """The standard output of a command; None if it does not exist, fails, or takes longer than 20 s."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout if result.returncode == 0 else None
