"""Comma-separated rows: text but for known numbers, each with its place."""

import csv
import io
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reading_rows import PACK, Write, contents, read, refusal

from uft_ds.data.rows.reading import parse_row


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
        (b"prompt;response\nq;a\n", ":1: the columns are divided by ';', expected commas"),
        (b"prompt\tresponse\nq\ta\n", r":1: the columns are divided by '\t', expected commas"),
        (b"a,a\n1,2\n", ":1: the first line must name the columns; 'a' is there twice"),
        (b"a,b\r1,2\r", ":1: its lines end with \\r alone; only \\n ends a line here: convert the file"),
        (b"a,\xe9\n1,2\n", ":1: byte 2 is not UTF-8"),
        (b"a,b\nx,1\ny", ":3: the last line is cut off (1 cells, where the first line names 2 columns): is the file"),
    ],
)
def test_a_broken_csv_file_is_refused(write: Write, data: bytes, message: str) -> None:
    """After a broken quote it is a guess where the next row starts."""
    path = write("a.csv", data)
    assert refusal(path).startswith(f"{path}{message}")
