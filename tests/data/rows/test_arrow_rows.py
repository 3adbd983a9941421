"""Rows of Parquet and Arrow files: plain values, and damage found."""

from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from reading_rows import TABLE, TABLE_NAMES, Write, contents, read, refusal, write_arrow_table, write_table


@pytest.mark.parametrize("name", TABLE_NAMES)
def test_rows_of_tables_are_plain_values(tmp_path: Path, name: str) -> None:
    """Conversations arrive as lists and dicts, numbers as Python's, anything else as Arrow gives it."""
    path = tmp_path / name
    write_table(path, TABLE)
    assert contents(path) == [(f"{path}:1", TABLE[0]), (f"{path}:2", TABLE[1])]
    assert [row.byte for row in read(path)] == [None, None]


@pytest.mark.parametrize("name", TABLE_NAMES)
def test_rows_of_tables_are_counted_across_batches(tmp_path: Path, name: str) -> None:
    """Batches longer than a thousand rows are divided; none is lost or doubled."""
    write_table(tmp_path / name, [{"a": i} for i in range(4567)])
    rows = read(tmp_path / name)
    assert [row.line for row in rows] == list(range(1, 4568))
    assert [row.value for row in rows] == [{"a": i} for i in range(4567)]


@pytest.mark.parametrize("name", TABLE_NAMES)
def test_a_damaged_table_is_refused(tmp_path: Path, write: Write, name: str) -> None:
    """Text under the wrong name and a truncated file are refused by name; Arrow itself takes a shortened stream."""
    kind = "parquet" if name == "a.parquet" else "Arrow"
    write_table(tmp_path / name, [{"a": f"text {i}"} for i in range(300)])
    data = (tmp_path / name).read_bytes()
    for bad in (b"", b'{"a": 1}\n' * 10, data[:-8], data[: len(data) // 2]):
        assert f"not a readable {kind} file (" in refusal(write(name, bad))


def test_a_stream_cut_between_two_batches_is_refused(write: Write) -> None:
    """Arrow reads such a stream as a whole one with fewer rows."""
    packed = pa.BufferOutputStream()
    batch = pa.record_batch({"a": [1, 2]})
    with pa.ipc.new_stream(packed, batch.schema) as writer:
        writer.write_batch(batch)
        cut = packed.tell()
        writer.write_batch(batch)
    path = write("a.arrow", packed.getvalue().to_pybytes()[:cut])
    assert "it has no end-of-stream mark); is the copy complete?" in refusal(path)


@pytest.mark.parametrize("name", TABLE_NAMES)
def test_text_that_is_not_utf8_in_a_table_is_refused(tmp_path: Path, name: str) -> None:
    """Arrow writes and reads such text without a look at it."""
    text = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xe9")])
    table = pa.table({"a": text})
    path = tmp_path / name
    write_arrow_table(path, table)
    assert "not a readable" in refusal(path)


@pytest.mark.parametrize("name", TABLE_NAMES)
def test_a_column_given_twice_is_refused(tmp_path: Path, name: str) -> None:
    """One of the two would be lost in a row's dict."""
    table = pa.table([pa.array([1]), pa.array([2])], names=["a", "a"])
    path = tmp_path / name
    write_arrow_table(path, table)
    assert refusal(path) == f"{path}: column 'a' is there twice"


def test_what_datasets_saves_is_read(tmp_path: Path) -> None:
    """Its folder holds two JSON files about the rows, which are none."""
    datasets.Dataset.from_list([{"a": 1}, {"a": 2}]).save_to_disk(tmp_path / "saved", num_shards=2)
    assert (tmp_path / "saved" / "state.json").exists()
    assert [row for _, row in contents(tmp_path / "saved")] == [{"a": 1}, {"a": 2}]
