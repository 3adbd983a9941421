"""JSON as rows, by lines and as an array: each with its place, nothing made up, nothing lost unsaid."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reading_rows import PACK, Write, contents, read, reason, refusal

from uft_ds.data.rows import json_rows
from uft_ds.data.rows.places import indexed
from uft_ds.data.rows.reading import parse_row

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
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_rows_are_read_back(
    rows: list[dict], indent: int | None, escaped: bool, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `json.dumps` writes is read back the same, with line and byte, wherever the window on the file ends."""
    monkeypatch.setattr(json_rows, "_CHUNK_BYTES", chunk)
    array = json.dumps(rows, ensure_ascii=escaped, indent=indent)
    expected_lines, line = [], 1 + (indent is not None)
    for index, row in enumerate(rows):
        expected_lines.append(line if indent is not None or len(rows) == 1 else indexed(index))
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
    monkeypatch.setattr("uft_ds.data.rows.csv_rows.MAX_ROW_BYTES", 2**20)
    filler = b"x" * 2**20
    bad = {"a.jsonl": b'{}\n{"a": "%s"}\n', "a.json": b'[{},\n{"a": "%s"}]', "a.csv": b'a\n"%s"\n'}[name] % filler
    path = write(name, bad)
    assert refusal(path).startswith(f"{path}:2: a row of more than 1 MiB; ")


# Arrays


def test_json_rows_carry_the_line_that_they_alone_start_on(write: Write) -> None:
    """Rows that share a line are told apart by their index; a byte order mark changes nothing."""
    path = write("a.json", b'\xef\xbb\xbf\n[{"a": 1}, {"a":\n 2}\n,\r\n {"a": 3}]\n')
    assert contents(path) == [(f"{path}[0]", {"a": 1}), (f"{path}[1]", {"a": 2}), (f"{path}:5", {"a": 3})]


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
        (b'{"a": 1}\r{"a": 2}\r', ":1: its lines end with \\r alone; only \\n ends a line here: convert the file"),
        (b'{"a": 1}\r{"a": 2}\n', ":1: its lines end with \\r alone"),
        (b'\xef\xbb\xbf{\n  "a": 1\n}\n', ":1: an object over several lines"),
        ('{"a": 1}\n'.encode("utf-16"), ":1: this is UTF-16; convert the file to UTF-8 (iconv"),
        ('{"a": 1}\n'.encode("utf-16-le"), ":1: this is UTF-16"),
        (gzip.compress(b'{"a": 1}\n', mtime=0), ": no text, but packed by gzip: give its name the ending .gz"),
        (b"\x28\xb5\x2f\xfd\x04", ": no text, but packed by zstd: give its name the ending .zst"),
        (b"PK\x03\x04\x14\0", ": no text, but a zip archive"),
        (b"PAR1\x15\x04", ": no text, but parquet"),
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
