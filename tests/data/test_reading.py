"""Rows from files and the hub: streamed, each with its file and line, and nothing that JSON does not allow."""

import csv
import gzip
import io
import json
import time
import tracemalloc
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import partial
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


# Lines


def test_jsonl_rows_carry_their_line_and_byte(write: Write) -> None:
    """Blank lines are skipped but counted: a place is the line that an editor shows, and the bytes are found there."""
    text = b'{"a": 1}\n\n   \n {"a": 2}\n'
    path = write("a.jsonl", text)
    assert contents(path) == [(f"{path}:1", {"a": 1}), (f"{path}:4", {"a": 2})]
    assert [(row.byte, row.value) for row in read(path)] == [(0, b'{"a": 1}'), (14, b' {"a": 2}')]
    assert text[14:].startswith(b' {"a": 2}')


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
    assert [data[row.byte :].startswith(row.value) for row in read(path)] == [True, True]


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85", "\u000b", "\u001c"])
def test_only_a_newline_ends_a_line(write: Write, character: str) -> None:
    """Characters at which str.splitlines breaks belong to the text, and count for no line."""
    row = {"a": f"x{character}y"}
    text = json.dumps(row, ensure_ascii=character < " ").encode()
    lines, array = write("a.jsonl", text + b"\n{}"), write("a.json", b"[" + text + b",\n{}]")
    for path in (lines, array):
        assert contents(path) == [(f"{path}:1", row), (f"{path}:2", {})]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip


@given(
    rows=st.lists(st.dictionaries(st.text(max_size=5), VALUES, max_size=3), min_size=1, max_size=8),
    indent=st.sampled_from([None, 0, 1, 4]),
    escaped=st.booleans(),
    chunk=st.sampled_from([1, 7, 64, 4096]),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_rows_are_read_back(
    rows: list[dict], indent: int | None, escaped: bool, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `json.dumps` writes is read back the same, with line and byte, wherever the window on the file ends."""
    monkeypatch.setattr(json_rows, "_CHUNK_BYTES", chunk)
    array = json.dumps(rows, ensure_ascii=escaped, indent=indent)
    expected_lines, line = [], 1 + (indent is not None)
    for row in rows:
        expected_lines.append(line)
        # The nested levels' newlines are the same wherever the row stands; a comma's newline follows.
        line += json.dumps(row, indent=indent).count("\n") + (indent is not None)
    lines = "\n".join(json.dumps(row, ensure_ascii=escaped) for row in rows)
    for packed, pack in PACK.items():
        for kind, text, numbers in ((".json", array, expected_lines), (".jsonl", lines, range(1, len(rows) + 1))):
            path = tmp_path / f"a{kind}{packed}"
            path.write_bytes(pack(text.encode()))
            found = read(path)
            assert [parse_row(row.value) for row in found] == rows
            assert [row.line for row in found] == list(numbers)
            assert all(text.encode()[row.byte :].startswith(row.value) for row in found)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"a": 1', "not valid JSON: Expecting ',' delimiter at column 8"),
        (b"{'a': 1}", "not valid JSON: Expecting property name"),
        (b'{"a": 1} {"a": 2}', "not valid JSON: Extra data at column 10"),
        (b'{"a": NaN}', "not valid JSON: NaN is not a number"),
        (b'{"a": [-Infinity]}', "not valid JSON: -Infinity is not a number"),
        (b'{"a": {"b": 1, "c": 2, "b": 1}}', "not valid JSON: key 'b' is given twice"),
        (b'{"a": [1, -1e999]}', "-1e999 is beyond the range of a float"),
        (b'{"a": 18446744073709551616}', "18446744073709551616 is beyond 64 bits"),
        (b'{"a": -9223372036854775809}', "-9223372036854775809 is beyond 64 bits"),
        (b'{"a": ' + b"9" * 5000 + b"}", "99999999999999999999... (5000 characters) is beyond 64 bits"),
        (b'{"a": ["x\\uD83D y"]}', "'\\ud83d' is half of a surrogate pair"),
        (b'{"a": {"\\udc00": 1}}', "'\\udc00' is half of a surrogate pair"),
        (b'{"a": "\xe9"}', "byte 7 is not UTF-8; convert the file to UTF-8"),
        (b'{"a": "\xed\xa0\x80"}', "byte 7 is not UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "byte 0 is not UTF-8"),
        (b'"text"', "expected a JSON object, found text"),
        (b"[1]", "expected a JSON object, found an array"),
        (b"null", "expected a JSON object, found null"),
        (b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}", "nested more than 100 levels deep"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested more than 100 levels deep"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_bad_row_is_the_callers_to_leave_out(write: Write, line: bytes, message: str) -> None:
    """It is a ValueError with the reason, without place or content, and the rows around it are read."""
    path = write("a.jsonl", b'{"a": 1}\n\n' + line + b'\n{"a": 2}\n')
    first, bad, last = read(path)
    assert (bad.line, bad.value) == (3, line)
    assert message in reason(bad.value)
    assert [parse_row(first.value), parse_row(last.value)] == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize(
    ("row", "value"),
    [
        (b'{"a": "\\ud83d\\ude00 \\\\ud83d"}', {"a": "\U0001f600 \\ud83d"}),
        (b'{"a": [18446744073709551615, -9223372036854775808, 1e308]}', {"a": [2**64 - 1, -(2**63), 1e308]}),
        (b'{"a": "' + b"[{" * 200 + b'"}', {"a": "[{" * 200}),
        (b'{"a": "\\u0000"}', {"a": "\x00"}),
    ],
    ids=["a whole surrogate pair", "the ends of 64 bits", "brackets in a text", "NUL"],
)
def test_what_only_looks_bad_is_read(row: bytes, value: dict) -> None:
    """The checks refuse no more than they say."""
    assert parse_row(row) == value


def test_a_hundred_levels_may_be_nested() -> None:
    """The row itself is the first; the limit does not depend on how deep the caller's own calls are."""
    row = b'{"a": ' + b"[" * 99 + b"]" * 99 + b"}"

    def called_from(depth: int) -> Any:
        return parse_row(row) if depth == 0 else called_from(depth - 1)

    assert called_from(0) == called_from(500) == json.loads(row)


@pytest.mark.parametrize(
    "cut", [b'{"a": 1, "b": "x', b'{"a": 1, "b": "\xc3', b'{"a": 1, "b": tr', b'{"a": NaN, "a": 1,', b"{"]
)
def test_a_last_line_that_was_cut_off_is_refused(write: Write, cut: bytes) -> None:
    """Without newline and not JSON: rows may be missing behind it, so it is not left to be skipped."""
    path = write("a.jsonl", b'{"a": 1}\n' + cut)
    message = refusal(path)
    assert message.startswith(f"{path}:2: the last line is cut off (")
    assert message.endswith("): is the file still being written, or was a copy interrupted?")


@pytest.mark.parametrize(
    "whole", [b'{"a": NaN}', b'{"a": 1, "a": 1}', b"[1]", b"9" * 5000, b"[" * 10**5 + b"]" * 10**5]
)
def test_a_last_line_that_is_whole_is_no_worse_than_others(write: Write, whole: bytes) -> None:
    """A row that breaks another rule is bad, but not cut off."""
    rows = read(write("a.jsonl", b'{"a": 1}\n' + whole))
    assert rows[1].value == whole
    assert reason(whole)


def test_a_broken_last_line_with_a_newline_is_a_bad_row(write: Write) -> None:
    """Whoever wrote it was done with it: nothing is missing behind."""
    rows = read(write("a.jsonl", b'{"a": 1}\n{"a": 1, "b": "x\n'))
    assert "Unterminated string" in reason(rows[1].value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_a_row_too_long_is_refused(write: Write, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file without newlines, or with a quote that is never closed, is not taken into memory."""
    assert json_rows.MAX_ROW_BYTES == 64 * 2**20
    monkeypatch.setattr(json_rows, "MAX_ROW_BYTES", 2**20)
    monkeypatch.setattr("uft_ds.data.csv_rows.MAX_ROW_BYTES", 2**20)
    filler = b"x" * 2**20
    bad = {"a.jsonl": b'{}\n{"a": "%s"}\n', "a.json": b'[{},\n{"a": "%s"}]', "a.csv": b'a\n"%s"\n'}[name] % filler
    path = write(name, bad)
    assert refusal(path).startswith(f"{path}:2: a row of more than 1 MiB; ")


# Arrays


def test_json_rows_carry_the_line_they_start_on(write: Write) -> None:
    """Rows may stand on one line or span several; a byte order mark changes nothing."""
    path = write("a.json", b'\xef\xbb\xbf\n[{"a": 1}, {"a":\n 2}\n,\r\n {"a": 3}]\n')
    assert contents(path) == [(f"{path}:2", {"a": 1}), (f"{path}:2", {"a": 2}), (f"{path}:5", {"a": 3})]


@pytest.mark.parametrize(
    ("element", "message"),
    [
        (b"2", "expected a JSON object, found a number"),
        (b"1.5e3", "expected a JSON object, found a number"),
        (b'{"a": NaN}', "NaN is not a number"),
        (b'{"a": 1e999}', "beyond the range"),
        (b'{"a": ' + b"9" * 5000 + b"}", "beyond 64 bits"),
        (b'{"a": 1, "a": 2}', "key 'a' is given twice"),
        (b'{"a": "\xff"}', "byte 7 is not UTF-8"),
        (b'{"a": "\\ud800"}', "surrogate"),
        (b'{"a": ' + b"[" * 200 + b"]" * 200 + b"}", "nested more than"),
    ],
    ids=lambda value: repr(value)[:30],
)
@pytest.mark.parametrize("chunk", [3, 10**5])
def test_a_bad_element_is_the_callers_to_leave_out(
    write: Write, element: bytes, message: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same rules as for a line, and the rows around it are read."""
    monkeypatch.setattr(json_rows, "_CHUNK_BYTES", chunk)
    rows = read(write("a.json", b'[{"a": 1},\n' + element + b',\n{"a": 2}]'))
    assert [row.line for row in rows] == [1, 2, 3]
    assert rows[1].value == element
    assert message in reason(element)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"a": 1}', ": expected a JSON array of rows, found an object; one object a line is .jsonl"),
        (b'{"a": 1}\n{"a": 2}\n', ": expected a JSON array of rows, found an object; one object a line is .jsonl"),
        (b'{"data": [{"a": 1}]}', "rows under a key must be an array of their own"),
        (b'"text"', ":1: not valid JSON: Expecting a JSON array of rows at column 1"),
        ('[{"a": 1}]'.encode("utf-16"), ":1: this is UTF-16; convert the file to UTF-8"),
        ('[{"a": 1}]'.encode("utf-16-be"), ":1: this is UTF-16; convert the file to UTF-8"),
        (b'[{"a": 1},\n {"a": 2},\n {"a" 3}]', ":3: not valid JSON: Expecting ':' delimiter at column 7"),
        (b'[{"a": 1},\n {"a": 2}\n {"a": 3}]', ":3: not valid JSON: Expecting ',' delimiter at column 2"),
        (b'[{"a": 1},\n]', ":2: not valid JSON: Expecting value at column 1"),
        (b'[{"a": 1}]\n[{"a": 2}]', ":2: not valid JSON: Extra data at column 1"),
        (b'[{"a": 1},\n\xe9]', ":2: byte 11 is not UTF-8"),
        (b'[{"a": ' + b"[" * 10**5 + b"]" * 10**5 + b"}]", ":1: nested more than 100 levels deep"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_broken_array_is_refused(write: Write, data: bytes, message: str) -> None:
    """Behind the break no row can be found for certain; the message names the line."""
    path = write("a.json", data)
    assert refusal(path).startswith(str(path))
    assert message in refusal(path)
    assert "has no end" not in refusal(path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'[\n  {"a": 1},\n  {"a": 2}\n]', ":1: an array of rows; in .jsonl every line is one object: rename"),
        (b'\n[{"a": 1}]', ":2: an array of rows"),
        (b'\xef\xbb\xbf{\n  "a": 1\n}\n', ":1: an object over several lines"),
        ('{"a": 1}\n'.encode("utf-16"), ":1: this is UTF-16; convert the file to UTF-8 (iconv"),
        ('{"a": 1}\n'.encode("utf-16-le"), ":1: this is UTF-16"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_file_that_is_no_jsonl_is_named_for_what_it_is(write: Write, data: bytes, message: str) -> None:
    """None of these is a file whose last line was cut off."""
    path = write("a.jsonl", data)
    assert refusal(path).startswith(f"{path}{message}")


@pytest.mark.parametrize("end", range(40))
def test_an_array_that_was_cut_off_is_refused(write: Write, end: int) -> None:
    """Wherever a copy stopped, it is told from an array that is badly written."""
    whole = b'[{"a": "\\u00e9"},\n{"a": [1.5, true, "x"]}]'
    path = write("a.json", whole[:end])
    message = refusal(path)
    assert "the array has no end: is the file still being written, or was a copy interrupted?" in message
    assert message.startswith(f"{path}:{1 + whole[:end].count(10)}: not valid JSON: ")


# Compression, and files that cannot be read


@pytest.mark.parametrize("packed", [".gz", ".zst"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-20],
        lambda data: data[:-1],
        lambda data: data[:2],
        lambda data: b"",
        lambda data: b'{"a": 1}\n',
    ],
    ids=["cut off", "one byte short", "a head", "empty", "in name only"],
)
def test_a_damaged_archive_is_refused(write: Write, packed: str, damage: Callable[[bytes], bytes]) -> None:
    """A truncated archive, or one in name only, does not pass for a short file."""
    data = damage(PACK[packed](b"".join(b'{"a": %d}\n' % i for i in range(1000))))
    for kind in ("jsonl", "json"):
        assert "cannot be read" in refusal(write(f"a.{kind}{packed}", data))


@pytest.mark.parametrize("packed", [".gz", ".zst"])
def test_an_archive_damaged_late_names_the_last_good_line(write: Write, packed: str) -> None:
    """Rows before the damage have been given by then, for the file is streamed."""
    good = PACK[packed](b'{"a": 1}\n' * 100_000)
    path = write(f"a.jsonl{packed}", good + good[:-3])
    rows: list[RawRow] = []
    with pytest.raises(UserError, match=r"\(.*\); is the copy complete\?$") as caught:
        rows.extend(raw_rows(find_data(str(path), None)))
    assert rows[-1].line >= 100_000
    assert str(caught.value).startswith(f"{path}: cannot be read after line {rows[-1].line} (")


def test_changed_bytes_in_an_archive_are_found_by_its_checksum(write: Write) -> None:
    """gzip always has one, zstd's command line writes one: here over the row with key a."""
    frame = bytes.fromhex("28b52ffd04584900007b2261223a20317d0a3387dfc3")
    assert [row for _, row in contents(write("good.jsonl.zst", frame))] == [{"a": 1}]
    assert "cannot be read" in refusal(write("bad.jsonl.zst", frame.replace(b"a", b"b")))
    stored = gzip.compress(b'{"a": 1}\n', compresslevel=0)
    assert "cannot be read" in refusal(write("bad.jsonl.gz", stored.replace(b'"a"', b'"b"')))


@pytest.mark.parametrize("packed", [".gz", ".zst"])
def test_archives_one_after_another_are_one_file(write: Write, packed: str) -> None:
    """`cat a.gz b.gz` is an archive; so is what parallel compressors write."""
    path = write(f"a.jsonl{packed}", PACK[packed](b'{"a": 1}\n{"a"') + PACK[packed](b": 2}\n"))
    assert contents(path) == [(f"{path}:1", {"a": 1}), (f"{path}:2", {"a": 2})]


def test_a_file_that_cannot_be_opened_is_refused(write: Write) -> None:
    """Also one that went away since it was found."""
    path = write("a.jsonl", b"{}\n")
    data = find_data(str(path), None)
    path.unlink()
    for use in (content_hash, data_size, lambda data: list(raw_rows(data))):
        with pytest.raises(UserError, match=r"a\.jsonl: cannot be read \(No such file or directory\)$"):
            use(data)


@pytest.mark.parametrize(
    ("name", "data"), [("a.jsonl", b""), ("a.jsonl", b"\n \n"), ("a.json", b"[ ]"), ("a.csv", b"a\n")]
)
def test_a_file_without_rows_is_refused(write: Write, name: str, data: bytes) -> None:
    """Nothing is trained on nothing."""
    assert refusal(write(name, data)).endswith("no rows; the file is empty")


# Comma-separated files


def test_csv_cells_are_text_but_for_known_numbers(write: Write) -> None:
    """Only columns that hold numbers in a known format are read as such; an empty cell is None."""
    path = write("a.csv", b"prompt,score,label,id\n007,0.5,True,1e5\n,,FALSE,\nx,-1,1E0,y\n")
    assert contents(path) == [
        (f"{path}:2", {"prompt": "007", "score": 0.5, "label": True, "id": "1e5"}),
        (f"{path}:3", {"prompt": None, "score": None, "label": False, "id": None}),
        (f"{path}:4", {"prompt": "x", "score": -1, "label": 1.0, "id": "y"}),
    ]
    assert type(contents(path)[1][1]["label"]) is bool


@given(
    rows=st.lists(st.tuples(st.text(max_size=8), st.text(max_size=8)), min_size=1, max_size=6),
    mark=st.sampled_from([b"", b"\xef\xbb\xbf"]),
    newline=st.sampled_from(["\n", "\r\n"]),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_cells_are_read_back(rows: list[tuple[str, str]], mark: bytes, newline: str, tmp_path: Path) -> None:
    """What the standard library writes is read back the same, newlines and quotes in cells too."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator=newline, quoting=csv.QUOTE_ALL).writerows([("a", "b"), *rows])
    for packed, pack in PACK.items():
        path = tmp_path / f"a.csv{packed}"
        path.write_bytes(pack(mark + text.getvalue().encode()))
        found = [(row["a"] or "", row["b"] or "") for _, row in contents(path)]
        assert found == rows


def test_csv_rows_carry_the_line_they_start_on(write: Write) -> None:
    """Cells may hold newlines, and blank lines are skipped: the line and byte are still the file's."""
    text = b'a,b\r\n"x\ny",1\r\n\r\nz,2\r\n'
    path = write("a.csv", text)
    rows = read(path)
    assert [(row.line, row.value) for row in rows] == [(2, {"a": "x\ny", "b": "1"}), (5, {"a": "z", "b": "2"})]
    assert [text[row.byte :][:2] for row in rows] == [b'"x', b"z,"]


def test_a_long_cell_is_read(write: Write) -> None:
    """The standard library's limit of 128 KiB is shorter than a long conversation."""
    path = write("a.csv", b"a\n" + b"x" * 200_000 + b"\n")
    assert [len(row["a"]) for _, row in contents(path)] == [200_000]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"1,2,3", "3 cells, where the first line names 2 columns"),
        (b"1", "1 cells, where the first line names 2 columns"),
        (b"x,good", "column 'score' holds 'good'; expected a number, true, false or nothing"),
        (b"x,NaN", "column 'score' holds 'NaN'"),
        (b"x,1e999", "column 'score' holds '1e999'"),
        (b"x,null", "column 'score' holds 'null'"),
        (b"x,[1]", "column 'score' holds '[1]'"),
        (b'"x\n\xe9",1', "byte 3 is not UTF-8"),
    ],
)
def test_a_bad_csv_row_is_the_callers_to_leave_out(write: Write, line: bytes, message: str) -> None:
    """Where it ends is known, so the rows around it are read."""
    first, bad, last = read(write("a.csv", b"a,score\nx,1\n" + line + b"\ny,2\n"))
    assert bad.line == 3
    with pytest.raises(ValueError, match=r"^\S") as caught:
        parse_row(bad.value)
    assert message in str(caught.value)
    assert [parse_row(first.value), parse_row(last.value)] == [{"a": "x", "score": 1}, {"a": "y", "score": 2}]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'a,b\nx,1\n"x"y,2\n', ":3: not valid CSV: ',' expected after"),
        (b'a,b\n"x,1\ny,2\n', ":2: not valid CSV: unexpected end of data"),
        (b"a,a\n1,2\n", ":1: the first line must name the columns; 'a' is there twice"),
        (b"a,\xe9\n1,2\n", ":1: byte 2 is not UTF-8"),
        (b"a,b\nx,1\ny", ":3: the last line is cut off (1 cells, where the first line names 2 columns): is the file"),
    ],
)
def test_a_broken_csv_file_is_refused(write: Write, data: bytes, message: str) -> None:
    """After a broken quote it is a guess where the next row starts."""
    path = write("a.csv", data)
    assert refusal(path).startswith(f"{path}{message}")


# Parquet, Arrow and the hub

TABLE = [
    {"messages": [{"role": "user", "content": "é"}], "score": 0.5, "at": datetime(2024, 1, 2), "raw": b"\xff"},
    {"messages": [], "score": None, "at": None, "raw": None},
]


def write_table(path: Path, rows: list[dict]) -> None:
    table = pa.Table.from_pylist(rows)
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    else:
        layout = pa.ipc.new_file if path.name.startswith("file") else pa.ipc.new_stream
        with layout(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=max(1, len(rows) // 3))


TABLE_NAMES = ["a.parquet", "file.arrow", "stream.arrow"]


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
    if name == "a.parquet":
        pq.write_table(table, path)
    else:
        with (pa.ipc.new_file if name == "file.arrow" else pa.ipc.new_stream)(path, table.schema) as writer:
            writer.write_table(table)
    assert "not a readable" in refusal(path)


@pytest.mark.parametrize("name", TABLE_NAMES)
def test_a_column_given_twice_is_refused(tmp_path: Path, name: str) -> None:
    """One of the two would be lost in a row's dict."""
    table = pa.table([pa.array([1]), pa.array([2])], names=["a", "a"])
    path = tmp_path / name
    if name == "a.parquet":
        pq.write_table(table, path)
    else:
        with (pa.ipc.new_file if name == "file.arrow" else pa.ipc.new_stream)(path, table.schema) as writer:
            writer.write_table(table)
    assert refusal(path) == f"{path}: column 'a' is there twice"


def test_what_datasets_saves_is_read(tmp_path: Path) -> None:
    """Its folder holds two JSON files about the rows, which are none."""
    datasets.Dataset.from_list([{"a": 1}, {"a": 2}]).save_to_disk(tmp_path / "saved", num_shards=2)
    assert (tmp_path / "saved" / "state.json").exists()
    assert [row for _, row in contents(tmp_path / "saved")] == [{"a": 1}, {"a": 2}]


def fake_hub(monkeypatch: pytest.MonkeyPatch, data: datasets.Dataset, folder: str | None = None) -> None:
    def load(name: str, *, data_dir: str | None, split: str) -> datasets.Dataset:
        assert (name, data_dir, split) == ("who/what", folder, "train")
        return data

    monkeypatch.setattr(datasets, "load_dataset", load)


def test_rows_of_the_hub_carry_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """The split is train unless told, and a place names it."""
    rows = [{"a": i, "b": [str(i)]} for i in range(2345)]
    fake_hub(monkeypatch, datasets.Dataset.from_list(rows))
    found = contents("who/what")
    assert [row for _, row in found] == rows
    assert [place for place, _ in found] == [f"who/what[train]:{i}" for i in range(1, 2346)]


def test_a_folder_of_a_hub_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """What follows owner and name is a folder of the repository: HelpSteer2's preferences lie in one."""
    fake_hub(monkeypatch, datasets.Dataset.from_list([{"a": 1}]), "preference/more")
    assert contents("who/what/preference/more") == [("who/what/preference/more[train]:1", {"a": 1})]


def test_a_hub_data_set_is_known_by_its_content(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By its stored files and its split, or by its fingerprint where it has no files."""
    hashes = set()
    for rows in ([{"a": 1}], [{"a": 2}]):
        in_memory = datasets.Dataset.from_list(rows)
        in_memory.save_to_disk(tmp_path / str(rows[0]["a"]))
        stored = [datasets.load_from_disk(tmp_path / str(rows[0]["a"])) for _ in range(2)]
        for data in (in_memory, *stored):
            fake_hub(monkeypatch, data)
            found = find_data("who/what", None)
            hashes.add(content_hash(found))
            assert data_size(found) > 0
    assert len(hashes) == 4
    stored[0]._split = datasets.Split("train[:10%]")
    fake_hub(monkeypatch, stored[0])
    assert content_hash(find_data("who/what", None)) not in hashes


def test_a_hub_name_without_network_fails_at_once() -> None:
    """The message says that it is neither a path nor to be had, and what to do; no waiting for time-outs."""
    start = time.monotonic()
    message = refusal("nobody/no-such-data", "train")
    assert "neither a local file or folder, nor could it be had from the hub" in message
    assert "give a local path" in message
    assert "Traceback" not in message
    assert time.monotonic() - start < 30


# Files and folders


def test_a_folder_gives_its_data_files_in_order(write: Write, tmp_path: Path) -> None:
    """All data files, sorted, those of folders below and of other kinds too; other files are ignored."""
    write("data/b.jsonl", b'{"a": 2}')
    write("data/a.json", b'[{"a": 1}]')
    write("data/sub/c.jsonl.gz", gzip.compress(b'{"a": 3}'))
    write("data/sub/d.json.zst", zstd(b'[{"a": 4}]'))
    write_table(tmp_path / "data" / "sub" / "e.arrow", [{"a": 5}])
    write("data/sub/f.csv", b"label\n6")
    write("data/README.md", b"no data")
    assert [row.get("a", row.get("label")) for _, row in contents(tmp_path / "data")] == [1, 2, 3, 4, 5, 6]


def test_a_place_is_what_the_user_gave_and_the_file_below(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths stay relative; line and row counts begin anew in each file."""
    folder = write("data/a.jsonl", b'{"a": 1}\n{"a": 2}').parent
    write("data/sub/b.jsonl", b'{"a": 3}')
    monkeypatch.chdir(folder.parent)
    expected = ["data/a.jsonl:1", "data/a.jsonl:2", "data/sub/b.jsonl:1"]
    for path in ("data", "data/"):
        assert [place for place, _ in contents(path)] == expected
    assert contents("./data/a.jsonl")[0][0] == "./data/a.jsonl:1"


def test_the_label_is_what_the_user_gave(write: Write) -> None:
    """With its split."""
    path = write("train.jsonl", b"{}")
    assert find_data(str(path), None).label == str(path)
    assert find_data(str(path.parent), "train").label == f"{path.parent}[train]"


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
    write_table(part, [{"a": 1}, {"a": 2}])
    for folder in (tmp_path, part.parent):
        assert [place for place, _ in contents(folder)] == [f"{part}:1", f"{part}:2"]


def test_a_folder_without_data_is_refused(write: Write, tmp_path: Path) -> None:
    """The kinds of files that are read are named."""
    write("data/README.md", b"no data")
    assert f"no data file ({', '.join(SUFFIXES)})" in refusal(tmp_path / "data")


@pytest.mark.parametrize(
    "name", ["missing.jsonl", "missing/file.parquet", "a/b.csv", "a/b.arrow", "a/b.json.zst", "./missing", "missing"]
)
def test_a_missing_file_is_refused(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What looks like a path is not looked for on the hub."""
    monkeypatch.chdir(tmp_path)
    assert refusal(name) == f"{name}: no such file or folder"


def test_a_path_too_long_for_the_system_is_refused() -> None:
    """A text that was taken for a path is no crash, and is not printed in full."""
    with pytest.raises(UserError, match=r"^x{80}\.\.\.: no such file or folder"):
        find_data("x" * 5000, None)


def test_an_unknown_kind_of_file_is_refused(write: Write) -> None:
    """The kinds that are read are named."""
    message = refusal(write("a.txt", b"a,b\n"))
    assert "unknown kind of file; expected one of .jsonl, .json, .csv, .jsonl.gz," in message


def test_the_hash_is_of_content_and_order(write: Write) -> None:
    """A renamed or moved file is the same data; a changed byte or another order is not."""

    def hashed(*files: tuple[str, bytes]) -> str:
        folder = write(f"{len(list(root.iterdir()))}/README", b"").parent
        for name, data in files:
            (folder / name).write_bytes(data)
        return content_hash(find_data(str(folder), None))

    root = write("README", b"").parent
    first = hashed(("a.jsonl", b'{"a": 1}'), ("b.jsonl", b'{"a": 2}'))
    assert first == hashed(("c.jsonl", b'{"a": 1}'), ("d.jsonl", b'{"a": 2}'))
    assert first != hashed(("a.jsonl", b'{"a": 2}'), ("b.jsonl", b'{"a": 1}'))
    assert first != hashed(("a.jsonl", b'{"a": 1}'), ("b.jsonl", b'{"a": 3}'))
    assert first != hashed(("a.jsonl", b'{"a": 1}{"a": 2}'))


# Streaming


@pytest.mark.parametrize("name", ["a.jsonl", "b.json", "c.csv", "d.jsonl.gz", "e.json.zst", *TABLE_NAMES])
def test_progress_goes_to_the_end(tmp_path: Path, name: str) -> None:
    """In bytes of the stored files, never backwards or beyond, about every thousand rows and after each file."""
    rows = [{"a": f"{i} {i * 7919 % 10007}" * 20} for i in range(10_500)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    text = {"json": json.dumps(rows), "csv": "a\n" + "\n".join(row["a"] for row in rows)}
    folder = tmp_path / "data"
    folder.mkdir()
    if name in TABLE_NAMES:
        write_table(folder / name, rows)
    else:
        _, kind, *packed = name.split(".")
        (folder / name).write_bytes(PACK["".join(f".{p}" for p in packed)](text.get(kind, lines).encode()))
    (folder / "z.jsonl").write_bytes(b"{}\n")
    data = find_data(str(folder), None)
    seen: list[tuple[int, int]] = []
    assert len(list(raw_rows(data, lambda done, total: seen.append((done, total))))) == 10_501
    size = data_size(data)
    assert size == sum(file.stat().st_size for file in folder.iterdir())
    assert {total for _, total in seen} == {size}
    done = [done for done, _ in seen]
    assert done == sorted(done)
    assert done[-2:] == [size - 3, size]
    assert len(done) == 12
    assert done[4] < size


def peak_bytes(path: Path) -> tuple[int, int]:
    """Number of rows, and the most that Python held while they were read."""
    tracemalloc.start()
    try:
        count = sum(bool(parse_row(row.value)) for row in raw_rows(find_data(str(path), None)))
        return count, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def many_rows(kind: str) -> Iterator[bytes]:
    """60 MB of rows, 30 000 of them."""
    filler = b"\xc3\xa9 text " * 250
    yield {"json": b"[\n", "csv": b"a,label\n"}.get(kind, b"")
    row = {"json": b'{"a": "%s", "label": %d}%s\n', "csv": b"%s,%d%s\n"}.get(kind, b'{"a": "%s", "label": %d}%s\n')
    for i in range(30_000):
        yield row % (filler, i, b"," if kind == "json" and i < 29_999 else b"")
    if kind == "json":
        yield b"]"


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.jsonl.gz"])
def test_a_large_file_is_never_in_memory(tmp_path: Path, name: str) -> None:
    """60 MB are read within 5 MB."""
    path = tmp_path / name
    open_file: Any = partial(gzip.open, compresslevel=1) if name.endswith(".gz") else open
    with open_file(path, "wb") as file:
        assert sum(file.write(part) for part in many_rows(name.split(".")[1])) > 60e6
    count, peak = peak_bytes(path)
    assert count == 30_000
    assert peak < 5e6


def test_a_stored_conversation_set_is_read(test_data: Path) -> None:
    """Every row of every kind of file people publish, and as many as the file's own text says."""
    for file in sorted(test_data.rglob("*.json*")):
        text = file.read_text(encoding="utf-8")
        expected = json.loads(text) if file.suffix == ".json" else [json.loads(li) for li in text.split("\n") if li]
        assert [row for _, row in contents(file)] == expected


def test_data_files_can_be_made_by_hand(write: Write) -> None:
    """Names are only for messages."""
    data = DataFiles("mine", ("one",), (write("a.jsonl", b"{}"),))
    assert [data.place(row.file, row.line) for row in raw_rows(data)] == ["one:1"]
