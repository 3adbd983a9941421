"""The names of a row's columns: as the data has them, and as the source's `columns` gives them to the format."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from uft_ds.data.rows.csv_rows import CsvRow, cell_value


def renamed(row: dict[str, Any], columns: Sequence[tuple[str, str | None]]) -> dict[str, Any]:
    """A row with the names that its format knows.

    Args:
        columns: (name for the format, name in the data), or (name, None) for a column that is left out.
    Raises:
        ValueError: the row has a value under the format's name, too, or a cell of a csv file is not the number that
            the format needs.
    """
    if not columns:
        return row
    away = {ours if theirs is None else theirs for ours, theirs in columns}
    kept = {key: value for key, value in row.items() if key not in away}
    for ours, theirs in columns:
        if theirs is None or theirs not in row:
            continue
        if kept.get(ours) is not None and row[theirs] is not None:
            raise ValueError(f"holds {ours!r}, and {theirs!r}, which `columns` gives the same name; leave one out")
        value = row[theirs]
        kept[ours] = cell_value(ours, value) if isinstance(row, CsvRow) and isinstance(value, str) else value
    return kept
