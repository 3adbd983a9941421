"""Reading a file in a test: its rows, their places, its refusal; and tables to be read."""

import gzip
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from uft_ds.data.rows.reading import RawRow, find_data, parse_row, raw_rows
from uft_ds.errors import UserError

Write = Callable[[str, bytes], Path]


def zstd(data: bytes) -> bytes:
    packed = pa.BufferOutputStream()
    with pa.CompressedOutputStream(packed, "zstd") as stream:
        stream.write(data)
    return packed.getvalue().to_pybytes()


PACK: dict[str, Callable[[bytes], bytes]] = {"": lambda data: data, ".gz": gzip.compress, ".zst": zstd}


def read(path: Path | str, split: str | None = None) -> list[RawRow]:
    return list(raw_rows(find_data(str(path), split)))


def contents(path: Path | str, split: str | None = None) -> list[tuple[str, dict]]:
    """(place, row) of every row."""
    data = find_data(str(path), split)
    return [(data.place(row.file, row.line), parse_row(row.value)) for row in raw_rows(data)]


def refusal(path: Path | str, split: str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        contents(path, split)
    assert str(path) in str(caught.value)
    return str(caught.value)


def reason(row: bytes) -> str:
    with pytest.raises(ValueError, match=r"^.") as caught:
        parse_row(row)
    assert type(caught.value) is ValueError
    return str(caught.value)


TABLE = [
    {"messages": [{"role": "user", "content": "é"}], "score": 0.5, "at": datetime(2024, 1, 2), "raw": b"\xff"},
    {"messages": [], "score": None, "at": None, "raw": None},
]


def write_table(path: Path, rows: list[dict]) -> None:
    write_arrow_table(path, pa.Table.from_pylist(rows))


def write_arrow_table(path: Path, table: pa.Table) -> None:
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    else:
        layout = pa.ipc.new_file if path.name.startswith("file") else pa.ipc.new_stream
        with layout(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=max(1, table.num_rows // 3))


TABLE_NAMES = ["a.parquet", "file.arrow", "stream.arrow"]
