"""Read JSON as rows, streamed and strict: one object per line, or one array of objects.

Two separate stages: `json_lines` and `json_array` find where each row ends and give its bytes; `parse_object` reads
one row and refuses a bad one, in any process.
"""

from __future__ import annotations

import codecs
import itertools
import json
import math
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from uft_ds.data.rows.places import indexed
from uft_ds.errors import UserError

MAX_ROW_BYTES = 64 * 2**20
MAX_DEPTH = 100
"""Largest number of nested levels. Python's own limit depends on the caller's stack and would not be reproducible."""

INTERRUPTED = "is the file still being written, or was a copy interrupted?"

CR_ALONE = r"its lines end with \r alone; only \n ends a line here: convert the file, as by `tr '\r' '\n'`"
_TWO_LINES_BY_CR = re.compile(rb"\}[ \t]*\r\s*\{")

_CHUNK_BYTES = 256 * 1024
_MAX_INTEGER_LETTERS = 20
_ESCAPE_LETTERS = 16
"""More letters than the longest token that reads as an error when a chunk's end splits it: \\uD83D\\uDE00."""

_BLANK = re.compile(r"[ \t\n\r]*")

LocatedJson = tuple[int, int, bytes]
"""(line or number of `places`, byte offset of the row's start, the row's bytes)"""


def parse_object(text: bytes) -> dict[str, Any]:
    """Read a JSON object so that no value is lost or changed.

    Raises:
        ValueError: says what is wrong. Besides the grammar, these are refused: a key given twice, NaN and Infinity,
            numbers beyond a float or 64 bits, lone surrogates, more than MAX_DEPTH levels.
    """
    value = parse_json(text)
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, found {_NAMES[type(value)]}")
    return value


def parse_json(text: bytes) -> Any:
    """Read any JSON value by the rules of `parse_object`."""
    try:
        value = _STRICT.decode(text.decode("utf-8"))
        # Only an escape can give a lone surrogate, because UTF-8 has no bytes for one.
        if b"\\ud" in text or b"\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise ValueError(not_utf8(error)) from None
    except UnicodeEncodeError as error:
        raise ValueError(f"{error.object[error.start]!a} is half of a surrogate pair, not a character") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    if text.count(b"{") + text.count(b"[") > MAX_DEPTH and _depth(value) > MAX_DEPTH:
        raise ValueError(_TOO_DEEP)
    return value


def not_utf8(error: UnicodeDecodeError) -> str:
    """The message for a row that is not UTF-8."""
    return f"byte {error.start} is not UTF-8; convert the file to UTF-8"


def read_line(stream: BinaryIO, name: str, number: int) -> bytes:
    """The next line with its newline; empty at the end of the file. Only \\n ends a line.

    Raises:
        UserError: the line is longer than MAX_ROW_BYTES.
    """
    line = stream.readline(MAX_ROW_BYTES + 1)
    if len(line) > MAX_ROW_BYTES:
        raise too_long(name, number)
    return line


def too_long(name: str, line: int) -> UserError:
    """The error for a row that is too long to be read; it may be the rest of the file."""
    return UserError(f"{name}:{line}: a row of more than {MAX_ROW_BYTES >> 20} MiB; split it, or check its quotes")


def json_lines(stream: BinaryIO, name: str) -> Iterator[LocatedJson]:
    """The lines that are not blank. Bad JSON in a line is left to the caller; a line that was cut off is refused.

    Raises:
        UserError: a line is too long, the file does not hold one object per line, or the last line has no newline
            and is not JSON.
    """
    number = byte = 0
    is_first = True
    while line := read_line(stream, name, number + 1):
        number += 1
        row = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if row.strip():
            if is_first:
                _refuse_other_layouts(row.strip(), f"{name}:{number}")
                is_first = False
            if not row.endswith(b"\n"):
                _refuse_cut_off(row, f"{name}:{number}")
            yield number, byte + len(line) - len(row), row.rstrip(b"\r\n")
        byte += len(line)


def _refuse_other_layouts(first: bytes, place: str) -> None:
    if first.startswith(b"["):
        raise UserError(f"{place}: an array of rows; in .jsonl every line is one object: rename the file to .json")
    if first == b"{":
        raise UserError(f"{place}: an object over several lines; in .jsonl every line is one whole object")
    if _TWO_LINES_BY_CR.search(first):
        raise UserError(f"{place}: {CR_ALONE}")


def _refuse_cut_off(line: bytes, place: str) -> None:
    try:
        _LENIENT.decode(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        reason = f"byte {error.start} is not UTF-8"
    except json.JSONDecodeError as error:
        reason = f"not valid JSON: {error.msg} at column {error.colno}"
    except RecursionError:
        return
    else:
        return
    raise UserError(f"{place}: the last line is cut off ({reason}): {INTERRUPTED}")


def json_array(stream: BinaryIO, name: str) -> Iterator[LocatedJson]:
    """The elements of a file's one array, each with the line on which it starts; by their index where they share one.

    Raises:
        UserError: the file is not an array, or is broken so that the next element cannot be found.
    """
    text = _ArrayText(stream, name)
    if text.next_letter() == "\ufeff":
        text.take(1)
        text.column = 1
    opening = text.next_letter()
    if opening == "{":
        raise UserError(
            f"{name}: expected a JSON array of rows, found an object; one object a line is .jsonl, "
            "and rows under a key must be an array of their own"
        )
    if opening != "[":
        raise text.broken("Expecting a JSON array of rows")
    text.take(1)
    if text.next_letter() != "]":
        before = 0
        for index in itertools.count():
            line, byte, row = text.element()
            has_next = text.next_letter() == ","
            if has_next:
                text.take(1)
                text.next_letter()
            shares_line = line == before or (has_next and text.line == line)
            yield indexed(index) if shares_line else line, byte, row
            before = line
            if not has_next:
                break
    if text.next_letter() != "]":
        raise text.broken("Expecting ',' delimiter")
    text.take(1)
    if text.next_letter():
        raise text.broken("Extra data")


class _ArrayText:
    """A window on a file's text: it grows at the end, and text before `position` is dropped.

    Bytes that are not UTF-8 are kept as surrogates and written back unchanged, so a row has exactly the file's bytes.

    line, column, byte: the place of `position` in the file; line and column count from 1.
    """

    def __init__(self, stream: BinaryIO, name: str) -> None:
        self.stream, self.name = stream, name
        self.decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self.text, self.position = "", 0
        self.line, self.column, self.byte = 1, 1, 0
        self.is_whole = False

    def grow(self) -> bool:
        """Read at least as much as the window holds, so that a long row is not scanned many times. False at the end."""
        rest, new = self.text[self.position :], ""
        while not new and not self.is_whole:
            data = self.stream.read(max(_CHUNK_BYTES, len(rest)))
            self.is_whole = not data
            new = self.decoder.decode(data, self.is_whole)
        self.text, self.position = rest + new, 0
        return bool(new)

    def take(self, num_letters: int) -> bytes:
        """Move `position` forward and return the bytes that were passed."""
        taken = self.text[self.position : self.position + num_letters]
        data = taken.encode("utf-8", "surrogateescape")
        newlines = taken.count("\n")
        self.line += newlines
        self.column = len(taken) - taken.rfind("\n") if newlines else self.column + len(taken)
        self.byte += len(data)
        self.position += num_letters
        return data

    def next_letter(self) -> str:
        """The next letter after blanks; empty at the end of the file."""
        while True:
            blank = _BLANK.match(self.text, self.position)
            assert blank is not None
            self.take(blank.end() - self.position)
            if self.position < len(self.text):
                return self.text[self.position]
            if not self.grow():
                return ""

    def element(self) -> LocatedJson:
        """The value that starts at `position`."""
        line, byte = self.line, self.byte
        data = self.take(self._element_letters())
        if len(data) > MAX_ROW_BYTES:
            raise too_long(self.name, line)
        return line, byte, data

    def _element_letters(self) -> int:
        while True:
            window = len(self.text) - self.position
            try:
                _, end = _LENIENT.raw_decode(self.text, self.position)
            except json.JSONDecodeError as error:
                offset = error.pos - self.position
                # An error near the window's end, or an open string, may only mean that the window ends there.
                is_cut = offset > window - _ESCAPE_LETTERS or error.msg.startswith("Unterminated string")
                if not is_cut or (window <= MAX_ROW_BYTES and not self.grow()):
                    raise self.broken(error.msg, offset) from None
            except RecursionError:
                raise UserError(f"{self.name}:{self.line}: {_TOO_DEEP}") from None
            else:
                # A number at the end of the window may continue after it.
                num_letters = end - self.position
                if self.text[end - 1] == "}" or num_letters <= window - _ESCAPE_LETTERS or not self.grow():
                    return num_letters
            if window > MAX_ROW_BYTES:
                raise too_long(self.name, self.line)

    def broken(self, reason: str, offset: int = 0) -> UserError:
        """The error for text that is broken at `offset` letters after `position`."""
        self.take(offset)
        if "\udc80" <= self.text[self.position : self.position + 1] <= "\udcff":
            return UserError(f"{self.name}:{self.line}: byte {self.byte} is not UTF-8; convert the file to UTF-8")
        has_end = not self.is_whole or self.text.rstrip().endswith("]")
        hint = "" if has_end else f"; the array has no end: {INTERRUPTED}"
        return UserError(f"{self.name}:{self.line}: not valid JSON: {reason} at column {self.column}{hint}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"not valid JSON: key {next(k for k in keys if keys.count(k) > 1)!r} is given twice")
    return value


def _constant(name: str) -> Any:
    raise ValueError(f"not valid JSON: {name} is not a number")


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{_shortened(text)} is beyond the range of a float")
    return value


def _integer(text: str) -> int:
    # Python refuses to convert integers of more than 4,300 digits, so long ones are not converted at all.
    value = int(text) if len(text) <= _MAX_INTEGER_LETTERS else 2**64
    if not -(2**63) <= value < 2**64:
        raise ValueError(f"{_shortened(text)} is beyond 64 bits")
    return value


def _shortened(text: str) -> str:
    return text if len(text) <= 30 else f"{text[:20]}... ({len(text)} characters)"


def _depth(value: Any) -> int:
    level, depth = [value], 0
    while level:
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        depth += 1
    return depth


_NAMES = {list: "an array", str: "text", int: "a number", float: "a number", bool: "true or false", type(None): "null"}
_TOO_DEEP = f"nested more than {MAX_DEPTH} levels deep"
_STRICT = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant, parse_float=_float, parse_int=_integer)
# Numbers are skipped, not converted: an integer of 5,000 digits would raise.
_LENIENT = json.JSONDecoder(parse_float=str, parse_int=str)
