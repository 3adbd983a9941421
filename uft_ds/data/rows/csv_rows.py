"""Rows of comma-separated files, whose cells are text but for the columns that hold numbers in known formats."""

from __future__ import annotations

import codecs
import csv
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from uft_ds.data.rows.json_rows import INTERRUPTED, MAX_ROW_BYTES, not_utf8, parse_json, read_line, too_long
from uft_ds.errors import UserError

NUMERIC_COLUMNS = frozenset(
    {
        "score",
        "label",
        "helpfulness",
        "correctness",
        "coherence",
        "complexity",
        "verbosity",
        "preference_strength",
        "score_chosen",
        "score_rejected",
        "overall_score",
        "chosen-rating",
        "rejected-rating",
    }
)
"""Read as JSON numbers, true or false. In any other column "007" and "1e5" stay what they are: text."""


@dataclass(frozen=True)
class BadRow:
    """A row that could not be made into values, but whose end is known, so that it can be skipped."""

    reason: str


def csv_rows(stream: BinaryIO, name: str) -> Iterator[tuple[int, int, dict[str, Any] | BadRow]]:
    """Line and offset at which each row starts, and its values by the header's names.

    Raises:
        UserError: no usable header, or broken quotes: where the next row starts is then a guess.
    """
    # The limit is the process's, 128 KiB unless told; a conversation may be longer. `_Lines` has the real limit.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_ROW_BYTES))
    lines = _Lines(stream, name)
    reader = csv.reader(lines, strict=True)
    header: list[str] | None = None
    while True:
        line, byte = lines.start_row()
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise UserError(f"{name}:{line}: not valid CSV: {error}") from None
        if cells is None:
            return
        if not cells:
            continue
        if header is None:
            header = _header(cells, lines, f"{name}:{line}")
        else:
            yield line, byte, _values(header, cells, lines, f"{name}:{line}")


class _Lines:
    """A file's lines for `csv.reader`, which takes as many as a row has.

    row: the lines of the present row.
    """

    def __init__(self, stream: BinaryIO, name: str) -> None:
        self.stream, self.name = stream, name
        self.line = self.byte = self.row_byte = 0
        self.row: list[bytes] = []

    def start_row(self) -> tuple[int, int]:
        """Line and offset of the row that comes next."""
        self.row.clear()
        self.row_byte = self.byte
        return self.line + 1, self.byte

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        data = read_line(self.stream, self.name, self.line + 1)
        if not data:
            raise StopIteration
        self.line += 1
        self.byte += len(data)
        self.row.append(data)
        if self.byte - self.row_byte > MAX_ROW_BYTES:
            raise too_long(self.name, self.line + 1 - len(self.row))
        if self.line == 1:
            data = data.removeprefix(codecs.BOM_UTF8)
        # The row that holds another encoding is refused below; the next one must still be found.
        return data.decode("utf-8", "surrogateescape")

    def broken_encoding(self) -> str | None:
        """Which byte of the row is not UTF-8."""
        try:
            b"".join(self.row).decode("utf-8")
        except UnicodeDecodeError as error:
            return not_utf8(error)
        return None


def _header(names: list[str], lines: _Lines, place: str) -> list[str]:
    if reason := lines.broken_encoding():
        raise UserError(f"{place}: {reason}")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{place}: the first line must name the columns; {twice!r} is there twice")
    return names


def _values(header: list[str], cells: list[str], lines: _Lines, place: str) -> dict[str, Any] | BadRow:
    if reason := lines.broken_encoding():
        return BadRow(reason)
    if len(cells) != len(header):
        found = f"{len(cells)} cells, where the first line names {len(header)} columns"
        if len(cells) < len(header) and not lines.row[-1].endswith(b"\n"):
            raise UserError(f"{place}: the last line is cut off ({found}): {INTERRUPTED}")
        return BadRow(found)
    try:
        return {column: _value(column, cell) for column, cell in zip(header, cells, strict=True)}
    except ValueError as error:
        return BadRow(str(error))


def _value(column: str, cell: str) -> Any:
    if not cell:
        return None
    if column not in NUMERIC_COLUMNS:
        return cell
    try:
        value = parse_json(cell.lower().encode())
    except ValueError:
        value = None
    if not isinstance(value, int | float):
        raise ValueError(f"column {column!r} holds {cell[:20]!r}; expected a number, true, false or nothing")
    return value
