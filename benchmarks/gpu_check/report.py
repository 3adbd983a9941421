"""What a stage finds, kept in a file that is complete at any moment, and where the stage computes."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass
class Report:
    """The findings of one stage.

    path: of the file that holds them; None: they are only kept.
    facts: single values by name. tables: rows by the table's name. problems: what failed, a sentence each.
    """

    path: Path | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    finished: bool = False

    def fact(self, name: str, value: Any) -> None:
        """Keep a single value."""
        self.facts[name] = value
        self._kept(f"{name}: {shown(value)}")

    def row(self, table: str, **cells: Any) -> None:
        """Keep a row of a table."""
        self.tables.setdefault(table, []).append(cells)
        self._kept(f"{table}: " + ", ".join(f"{name} {shown(value)}" for name, value in cells.items()))

    def demand(self, holds: bool, otherwise: str) -> None:
        """Keep a problem unless something holds. Call it with `a <= b`, not with `not a > b`: a NaN fails."""
        if not holds:
            self.problems.append(otherwise)
            self._kept(f"PROBLEM: {otherwise}")

    def finish(self) -> None:
        """All checks of the stage were made."""
        self.finished = True
        self._kept("")

    def _kept(self, line: str) -> None:
        if line:
            print(line, flush=True)
        if self.path is not None:
            values = {key: getattr(self, key) for key in ("finished", "problems", "facts", "tables")}
            new = self.path.with_suffix(".new")
            new.write_text(json.dumps(_plain(values)), encoding="utf-8")
            new.replace(self.path)


def _plain(value: Any) -> Any:
    """Values of JSON, which has no NaN."""
    if isinstance(value, dict):
        return {str(key): _plain(of) for key, of in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(of) for of in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def shown(value: Any) -> str:
    """A value for people: four digits."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Place:
    """Where a stage computes.

    toy: sizes for a CPU, whatever the device. deadline: of `time.monotonic`; a stage should end by itself before it.
    work: a folder for its files, removed at the end.
    """

    device: torch.device
    toy: bool
    deadline: float
    work: Path

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def size(self, full: int, toy: int) -> int:
        """A size on a GPU, and that of the test on a CPU."""
        return toy if self.toy else full


def wait(place: Place) -> None:
    """Until the device has done what was asked of it."""
    if place.device.type == "cuda":
        torch.cuda.synchronize()
