"""Rows of Parquet and Arrow files: plain values, and damage found."""

from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from reading_rows import TABLE, TABLE_NAMES, Write, contents, read, refusal, write_arrow_table, write_table

from uft_ds.data.rows.arrow_rows import plain_rows


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


# Values beyond Python's, and types of other programs


@pytest.mark.parametrize("name", TABLE_NAMES)
@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        ([2**62, None], pa.timestamp("us"), [2**62, None]),  # Postgres' infinity
        ([2**31 - 1, None], pa.date32(), [2**31 - 1, None]),
        ([1], pa.timestamp("us", "Nowhere/City"), [1]),
        ([2**62], pa.duration("s"), [2**62]),
        ([1, None], pa.timestamp("us"), [datetime(1970, 1, 1, 0, 0, 0, 1), None]),
    ],
    ids=str,
)
def test_times_that_python_does_not_have_are_numbers(
    tmp_path: Path, name: str, values: list[Any], kind: pa.DataType, expected: list[Any]
) -> None:
    """In a column beside the text, and inside of lists and structs; the row is read."""
    column = pa.array(values, pa.int32() if kind == pa.date32() else pa.int64()).cast(kind)
    if name == "a.parquet" and kind == pa.duration("s"):
        kind = pa.duration("ms")
        column = pa.array(values, pa.int64()).cast(kind)
    nested = pa.array([[{"at": value}] for value in column], pa.list_(pa.struct([("at", kind)])))
    write_arrow_table(tmp_path / name, pa.table({"at": column, "in": nested}))
    found = [row for _, row in contents(tmp_path / name)]
    assert [row["at"] for row in found] == expected
    assert [row["in"] for row in found] == [[{} if value is None else {"at": value}] for value in expected]


@pytest.mark.parametrize("name", TABLE_NAMES)
def test_decimals_are_numbers(tmp_path: Path, name: str) -> None:
    """A score from a database: 0.70 is 0.7, and 4.00 the integer that a rating must be."""
    column = pa.array([Decimal("0.70"), Decimal("4.00"), None], pa.decimal128(5, 2))
    write_arrow_table(tmp_path / name, pa.table({"score": column, "in": [[{"s": v.as_py()}] for v in column]}))
    found = [row for _, row in contents(tmp_path / name)]
    assert [(row["score"], row["in"]) for row in found] == [(0.7, [{"s": 0.7}]), (4, [{"s": 4}]), (None, [{}])]
    assert type(found[1]["score"]) is int


MIXED = [
    {"tools": [{"name": "f", "parameters": {"properties": {"city": {"type": "string", "default": None}}}}], "n": 1},
    {"tools": [{"name": "g", "parameters": {"properties": {"number": {"type": "integer"}}}}], "n": 2},
]


def of_mixed_keys() -> datasets.Dataset:
    """As `datasets` 5 stores values of mixed keys: as JSON text, of the extension type arrow.json."""
    features = datasets.Features({"tools": datasets.List(datasets.Json()), "n": datasets.Value("int64")})
    return datasets.Dataset.from_list(MIXED, features=features)


@pytest.mark.skipif(not hasattr(datasets, "Json"), reason="datasets 5 writes it")
def test_json_columns_of_datasets_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tools and calls are objects, not text, and each has its own keys alone: from parquet, a saved folder, the hub."""
    stored = of_mixed_keys()
    stored.to_parquet(tmp_path / "a.parquet")
    stored.save_to_disk(tmp_path / "saved")
    assert [row for _, row in contents(tmp_path / "a.parquet")] == MIXED
    assert [row for _, row in contents(tmp_path / "saved")] == MIXED
    monkeypatch.setattr(datasets, "load_dataset", lambda name, data_dir, split: stored)
    assert [row for _, row in contents("who/what")] == MIXED


def test_json_is_known_by_its_field_too() -> None:
    """pyarrow before 19 reads the extension type as text, whose field tells what it is."""
    field = pa.field("item", pa.string(), metadata={"ARROW:extension:name": "arrow.json"})
    table = pa.table(
        {"a": pa.array(['{"b": null}', None]), "in": pa.array([['{"b": 1}', None], []])},
        pa.schema([field.with_name("a"), pa.field("in", pa.list_(field))]),
    )
    assert plain_rows(table) == [{"a": {"b": None}, "in": [{"b": 1}, None]}, {"a": None, "in": []}]


@pytest.mark.skipif(not hasattr(pa, "json_"), reason="pyarrow 19 has the type")
def test_a_json_column_that_is_no_json_is_refused(tmp_path: Path) -> None:
    """By the file's name."""
    column = pa.array(["{"]).cast(pa.json_())
    write_arrow_table(tmp_path / "a.parquet", pa.table({"a": column}))
    assert "not a readable parquet file (not valid JSON" in refusal(tmp_path / "a.parquet")


def test_null_members_of_tables_are_absent(tmp_path: Path) -> None:
    """Arrow gives every struct the keys of all others: a call must not be learned with arguments that it lacks."""
    rows = [
        {"messages": [{"role": "user", "content": "q", "extra": {"a": 1}}]},
        {"messages": [{"role": "user", "content": "q", "extra": {"b": 2}}]},
    ]
    path = tmp_path / "rows.parquet"
    write_table(path, rows)
    assert [row for _, row in contents(path)] == rows
