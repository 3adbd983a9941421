"""Read comma-separated files as rows. Cells are text, except in the columns that hold numbers in known formats."""

from __future__ import annotations

import codecs
import csv
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from uft_ds.data.rows.json_rows import CR_ALONE, INTERRUPTED, MAX_ROW_BYTES, not_utf8, parse_json, read_line, too_long
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
"""These columns are read as JSON numbers, true or false. In all other columns "007" and "1e5" stay text."""


_OTHER_MARKS = (";", "\t", "|")
"""What divides columns in other dialects, which spreadsheets write in some languages."""


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be read as values, but whose end is known, so that it can be skipped."""

    reason: str


class CsvRow(dict[str, Any]):
    """The values of a row whose other cells are text: they become numbers by their column's name alone."""


def csv_rows(stream: BinaryIO, name: str) -> Iterator[tuple[int, int, dict[str, Any] | BadRow]]:
    """(line, byte offset, values by the header's names) of each row, where it starts.

    Raises:
        UserError: no usable header, or broken quotes, after which the start of the next row is not known.
    """
    # The csv module's limit is per process, 128 KiB by default; a conversation may be longer. `_Lines` sets our limit.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_ROW_BYTES))
    lines = _Lines(stream, name)
    reader = csv.reader(lines, strict=True)
    header: list[str] | None = None
    while True:
        line, byte = lines.start_row()
        try:
            cells = next(reader, None)
        except csv.Error as error:
            if "new-line character seen in unquoted field" in str(error):
                raise UserError(f"{name}:{line}: {CR_ALONE}") from None
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
    """The lines of a file for `csv.reader`, which takes several lines if a row has quoted newlines.

    row: the lines of the current row.
    """

    def __init__(self, stream: BinaryIO, name: str) -> None:
        self.stream, self.name = stream, name
        self.line = self.byte = self.row_byte = 0
        self.row: list[bytes] = []

    def start_row(self) -> tuple[int, int]:
        """Line and byte offset of the next row."""
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
        # A row in another encoding is refused later; until then its bytes must pass, so that the next row is found.
        return data.decode("utf-8", "surrogateescape")

    def broken_encoding(self) -> str | None:
        """A message that names the byte of the row that is not UTF-8, or None."""
        try:
            b"".join(self.row).decode("utf-8")
        except UnicodeDecodeError as error:
            return not_utf8(error)
        return None


def _header(names: list[str], lines: _Lines, place: str) -> list[str]:
    if reason := lines.broken_encoding():
        raise UserError(f"{place}: {reason}")
    other = next((mark for mark in _OTHER_MARKS if len(names) == 1 and mark in names[0]), None)
    if other is not None:
        raise UserError(f"{place}: the columns are divided by {other!r}, expected commas; save the file anew")
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
        return CsvRow((column, cell_value(column, cell)) for column, cell in zip(header, cells, strict=True))
    except ValueError as error:
        return BadRow(str(error))


def cell_value(column: str, cell: str) -> Any:
    """A cell as text, as the number, true or false that its column holds, or None if it is empty.

    Raises:
        ValueError: a column of numbers holds something else.
    """
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
