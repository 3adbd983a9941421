"""The result of one check of `uft doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "note", "problem"]
"""ok: nothing to do. note: works, with a drawback. problem: something that the package does will fail or hang."""


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    remedy: a command or an action; empty if there is nothing to do.
    """

    name: str
    state: State
    found: str
    remedy: str = ""
