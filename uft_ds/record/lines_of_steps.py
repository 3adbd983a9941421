"""Files of a run whose lines belong to steps: answers of the policy, one JSON object each."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, TypeVar, get_type_hints

from uft_ds.host.files import write_atomically


class OfStep(Protocol):
    """A dataclass of plain values, whose types are those of `_TYPES`. step: number of optimiser steps before it."""

    @property
    def step(self) -> int: ...


Line = TypeVar("Line", bound=OfStep)

_TYPES = {int: (int,), str: (str,), bool: (bool,), float: (int, float), float | None: (int, float, type(None))}
"""What JSON may hold where a dataclass declares a type; true is no number."""


def write_step(path: Path, step: int, lines: Iterable[Line], kind: type[Line]) -> None:
    """Write the lines of a step after those of earlier steps; lines of this and later steps are replaced.

    A resumed run may find lines of steps that it makes again.
    """
    _write(path, [*(line for line in read_lines(path, kind) if line.step < step), *lines])


def cut_after(path: Path, step: int, kind: type[Line]) -> None:
    """Remove lines of steps after this one, if there is a file."""
    if path.exists():
        _write(path, [line for line in read_lines(path, kind) if line.step <= step])


def read_lines(path: Path, kind: type[Line]) -> list[Line]:
    """All lines of a run; none if there is no file. Damaged lines are left out."""
    if not path.exists():
        return []
    types = get_type_hints(kind)
    found = (_parsed(line, kind, types) for line in path.read_bytes().split(b"\n"))
    return [line for line in found if line is not None]


def _write(path: Path, lines: Iterable[Any]) -> None:
    write_atomically(path, (json.dumps(asdict(line), ensure_ascii=False) + "\n" for line in lines))


def _parsed(line: bytes, kind: type[Line], types: Mapping[str, Any]) -> Line | None:
    try:
        found: dict[str, Any] = json.loads(line.decode("utf-8"))
        values = {name: found[name] for name in types}
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    is_whole = all(type(values[name]) in _TYPES[declared] for name, declared in types.items())
    return kind(**values) if is_whole else None
