"""Rows from files: each with its file and line, and nothing that JSON does not allow."""

import gzip
import json
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from uft_ds.data.reading import read_table
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


def contents(path: Path, split: str | None = None) -> list[tuple[str, dict]]:
    """(origin, row) of every row."""
    table = read_table(str(path), split)
    return [(table.origin(index), table.rows[index]) for index in range(len(table))]


def refusal(path: Path | str, split: str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        read_table(str(path), split)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_jsonl_rows_carry_their_line(write: Write) -> None:
    """Blank lines are skipped but counted: an origin is the line that an editor shows."""
    path = write("a.jsonl", b'{"a": 1}\n\n   \n{"a": 2}\n')
    assert contents(path) == [(f"{path}:1", {"a": 1}), (f"{path}:4", {"a": 2})]


@pytest.mark.parametrize(
    "data",
    [
        b'{"a": "\xc3\xa9"}\n{"a": 2}',
        b'\xef\xbb\xbf{"a": "\xc3\xa9"}\n{"a": 2}\n',
        b'{"a": "\xc3\xa9"}\r\n{"a": 2}\r\n',
        b'\xef\xbb\xbf{"a": "\xc3\xa9"}\r\n{"a": 2}\r\n\r\n',
    ],
    ids=["no newline at the end", "byte order mark", "CRLF", "both"],
)
def test_what_editors_and_windows_add_changes_nothing(write: Write, data: bytes) -> None:
    """A byte order mark, CRLF and a missing or doubled last newline leave the rows as they are."""
    path = write("a.jsonl", data)
    assert contents(path) == [(f"{path}:1", {"a": "é"}), (f"{path}:2", {"a": 2})]


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85", "\u000b", "\u001c"])
def test_only_a_newline_ends_a_line(write: Write, character: str) -> None:
    """Characters at which str.splitlines breaks belong to the text."""
    row = {"a": f"x{character}y"}
    path = write("a.jsonl", json.dumps(row, ensure_ascii=character < " ").encode())
    assert [found for _, found in contents(path)] == [row]


@given(
    rows=st.lists(st.dictionaries(st.text(max_size=5), st.text(max_size=8) | st.floats(0, 1), max_size=3), min_size=1)
)
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_rows_are_read_back(rows: list[dict], tmp_path: Path) -> None:
    """What `json.dumps` writes, escaped or not, is read back the same from jsonl, json and gz."""
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "a.jsonl").write_bytes(text.encode())
    (tmp_path / "a.json").write_bytes(json.dumps(rows).encode())
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    for name in ("a.jsonl", "a.json", "b.jsonl.gz"):
        assert [row for _, row in contents(tmp_path / name)] == rows


def test_json_rows_carry_their_number(write: Write) -> None:
    """A JSON array has no useful lines: rows are counted from 1."""
    path = write("a.json", b'\xef\xbb\xbf[{"a": 1},\n {"a": 2}]')
    assert contents(path) == [(f"{path}:1", {"a": 1}), (f"{path}:2", {"a": 2})]


def test_gz_is_read_through(write: Write) -> None:
    """Compressed files give the same rows and the same lines."""
    lines, array = (write(f"a.{kind}.gz", gzip.compress(data)) for kind, data in KINDS.items())
    assert contents(lines) == [(f"{lines}:1", {"a": 1}), (f"{lines}:2", {"a": 2})]
    assert contents(array) == [(f"{array}:1", {"a": 1}), (f"{array}:2", {"a": 2})]


KINDS = {"jsonl": b'{"a": 1}\n{"a": 2}\n', "json": b'[{"a": 1}, {"a": 2}]'}


def test_parquet_rows_are_plain_values(tmp_path: Path) -> None:
    """Conversations in parquet arrive as lists and dicts, numbers as Python's."""
    rows = [{"messages": [{"role": "user", "content": "q"}], "score": 0.5}, {"messages": [], "score": None}]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    assert contents(path) == [(f"{path}:1", rows[0]), (f"{path}:2", rows[1])]


def test_a_folder_gives_its_data_files_in_order(write: Write, tmp_path: Path) -> None:
    """All data files, sorted, those of folders below and of other kinds too; other files are ignored."""
    write("data/b.jsonl", b'{"a": 2}')
    write("data/a.json", b'[{"a": 1}]')
    write("data/sub/c.jsonl.gz", gzip.compress(b'{"a": 3}'))
    write("data/README.md", b"no data")
    assert [row["a"] for _, row in contents(tmp_path / "data")] == [1, 2, 3]


def test_split_chooses_files_of_a_folder_by_name(write: Write, tmp_path: Path) -> None:
    """A split takes the files whose names begin with it; one that no file has is refused with the names."""
    write("data/train-0.jsonl", b'{"a": 1}')
    write("data/train-1.jsonl", b'{"a": 2}')
    write("data/test.jsonl", b'{"a": 3}')
    assert [row["a"] for _, row in contents(tmp_path / "data", "train")] == [1, 2]
    assert [row["a"] for _, row in contents(tmp_path / "data", "test")] == [3]
    message = refusal(tmp_path / "data", "validation")
    assert "whose name begins with 'validation'; data files found: test.jsonl, train-0.jsonl" in message


def test_a_folder_named_like_a_file_is_no_file(tmp_path: Path) -> None:
    """Spark writes a folder `train.parquet` of parts: each part's rows come once."""
    part = tmp_path / "train.parquet" / "part-0.parquet"
    part.parent.mkdir()
    pq.write_table(pa.table({"a": [1, 2]}), part)
    assert [origin for origin, _ in contents(tmp_path)] == [f"{part}:1", f"{part}:2"]


def test_a_folder_without_data_is_refused(write: Write, tmp_path: Path) -> None:
    """The kinds of files that are read are named."""
    write("data/README.md", b"no data")
    assert "no data file (.jsonl, .json, " in refusal(tmp_path / "data")


@pytest.mark.parametrize("name", ["missing.jsonl", "missing/file.parquet", "./missing", "missing"])
def test_a_missing_file_is_refused(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What looks like a path is not looked for on the hub."""
    monkeypatch.chdir(tmp_path)
    assert refusal(name) == f"{name}: no such file or folder"


def test_a_path_too_long_for_the_system_is_refused() -> None:
    """A text that was taken for a path is no crash, and is not printed in full."""
    with pytest.raises(UserError, match=r"^x{80}\.\.\.: no such file or folder"):
        read_table("x" * 5000, None)


@pytest.mark.parametrize(("name", "data"), [("a.jsonl", b""), ("a.jsonl", b"\n \n"), ("a.json", b"[]")])
def test_a_file_without_rows_is_refused(write: Write, name: str, data: bytes) -> None:
    """Nothing is trained on nothing."""
    assert "no rows" in refusal(write(name, data))


def test_an_unknown_kind_of_file_is_refused(write: Write) -> None:
    """The kinds that are read are named."""
    assert "unknown kind of file; expected one of .jsonl, .json," in refusal(write("a.csv", b"a,b\n"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"a": 1', "not valid JSON"),  # a download that was cut off
        (b"{'a': 1}", "not valid JSON: Expecting property name"),
        (b'{"a": 1} {"a": 2}', "not valid JSON: Extra data at column 10"),
        (b'{"a": NaN}', "not valid JSON: NaN is not a number"),
        (b'{"a": [-Infinity]}', "not valid JSON: -Infinity is not a number"),
        (b'{"a": {"b": 1, "c": 2, "b": 1}}', "not valid JSON: key 'b' is given twice"),
        (b'{"a": "\xe9"}', "byte 7 is not UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "is not UTF-8"),
        (b'"text"', "expected a JSON object, found str"),
        (b"[1]", "expected a JSON object, found list"),
        (b"null", "expected a JSON object, found NoneType"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "not valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_bad_line_is_refused_by_its_number(write: Write, line: bytes, message: str) -> None:
    """The message names file:line, of the last line too."""
    path = write("a.jsonl", b'{"a": 1}\n\n' + line)
    assert message in refusal(path)
    assert refusal(path).startswith(f"{path}:3: ")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"a": 1}', "expected a JSON array of rows, found dict; one object a line is .jsonl"),
        (b'{"a": 1}\n{"a": 2}\n', "line 2: not valid JSON: Extra data"),
        (b'[{"a": 1},\n {"a": 2},\n {"a" 3}]', "line 3: not valid JSON"),
        (b'[{"a": 1}, 2]', "row 2: expected a JSON object, found int"),
        (b'[{"a": NaN}]', "NaN is not a number"),
        (b'[{"a": 1, "a": 2}]', "key 'a' is given twice"),
        (b'[{"a": "\xff"}]', "byte 8 is not UTF-8"),
        (b"", "not valid JSON"),
    ],
)
def test_a_bad_json_file_is_refused(write: Write, data: bytes, message: str) -> None:
    """A .json file is one array of objects; the message names the line or the row."""
    assert message in refusal(write("a.json", data))


@pytest.mark.parametrize("damage", [lambda d: d[:-20], lambda d: d[:12] + b"\xff" * 9 + d[21:], lambda d: b'{"a": 1}'])
def test_a_damaged_gz_is_refused(write: Write, damage: Callable[[bytes], bytes]) -> None:
    """A truncated or damaged archive, or one in name only, gives no rows at all."""
    data = gzip.compress(b"".join(b'{"a": %d}\n' % i for i in range(1000)))
    assert "cannot be read" in refusal(write("a.jsonl.gz", damage(data)))


def test_a_file_that_is_no_parquet_is_refused(write: Write) -> None:
    """Text under the wrong name, and a truncated file, are refused by name."""
    assert "not a readable parquet file" in refusal(write("a.parquet", b'{"a": 1}\n' * 10))
    good = write("good.parquet", b"")
    pq.write_table(pa.table({"a": [1, 2]}), good)
    assert "not a readable parquet file" in refusal(write("b.parquet", good.read_bytes()[:-8]))


def test_a_hub_name_without_network_fails_at_once() -> None:
    """The message says that it is neither a path nor to be had, and what to do; no waiting for time-outs."""
    start = time.monotonic()
    message = refusal("nobody/no-such-data", "train")
    assert "neither a local file or folder, nor could it be had from the hub" in message
    assert "give a local path" in message
    assert "Traceback" not in message
    assert time.monotonic() - start < 30
