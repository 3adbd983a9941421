"""Asking another program, which may be missing, broken or slow."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

_SECONDS = 20


def output_of(command: Sequence[str]) -> str | None:
    """What a command prints; None where there is none such, where it fails, or where it takes longer than 20 s."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout if result.returncode == 0 else None
