"""Rows from files and the hub: streamed, each with its file and line, and nothing that JSON does not allow."""

import csv
import gzip
import io
import json
import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from uft_ds.data import json_rows
from uft_ds.data.reading import SUFFIXES, DataFiles, RawRow, content_hash, data_size, find_data, parse_row, raw_rows
from uft_ds.errors import UserError

Write = Callable[[str, bytes], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Put bytes into a file of the test's folder."""

    def put(name: str, data: bytes) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path

    return put


def zstd(data: bytes) -> bytes:
    packed = io.BytesIO()
    with pa.CompressedOutputStream(packed, "zstd") as stream:
        stream.write(data)
        stream.flush()
        written = packed.getvalue  # closed with the stream
        return written() + _zstd_end(stream, packed, len(written()))


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
