"""What a check of an installation says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "note", "problem"]
"""ok: as it should be. note: works, but know it. problem: something that the package does will fail or hang."""


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    remedy: a command or an action; empty where there is nothing to do.
    """

    name: str
    state: State
    found: str
    remedy: str = ""
