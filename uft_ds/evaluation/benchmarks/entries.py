"""JSON files of benchmarks, read entry by entry, with the line at which each begins."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from uft_ds.errors import UserError
from uft_ds.host.files import read_regular_text

_SPACE = " \t\n\r"


def jsonl_entries(path: Path, option: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSONL file, each with its place, `file:line`. Empty lines are passed over.

    Args:
        option: which names the file, for messages.
    Raises:
        UserError: the file cannot be read, or a line is no JSON object.
    """
    for number, line in enumerate(_text(path, option).split("\n"), start=1):
        if line.strip():
            place = f"{path}:{number}"
            value, end = _decoded(line.strip(), 0, place)
            if end < len(line.strip()):
                raise UserError(
                    f"{place}: found {line.strip()[end : end + 20]!r} behind the object, expected a line end"
                )
            yield place, _object(place, value)


def list_entries(path: Path, option: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a file that holds one JSON list, each with its place: the line at which it begins.

    Raises:
        UserError: the file cannot be read, or is no list of objects.
    """
    text = _text(path, option)
    expected = 'expected one JSON list of objects, such as [{"instruction": "..."}]'
    at = _after_space(text, 0)
    if text[at : at + 1] != "[":
        raise UserError(f"{path}:1: found {text[at : at + 20]!r}, {expected}")
    at = _after_space(text, at + 1)
    while text[at : at + 1] != "]":
        place = f"{path}:{text.count(chr(10), 0, at) + 1}"
        value, at = _decoded(text, at, place)
        yield place, _object(place, value)
        at = _after_space(text, at)
        if text[at : at + 1] == ",":
            at = _after_space(text, at + 1)
        elif text[at : at + 1] != "]":
            line = text.count("\n", 0, at) + 1
            raise UserError(f"{path}:{line}: found {text[at : at + 20]!r} behind an entry, expected a comma or ]")
    rest = text[at + 1 :].strip()
    if rest:
        raise UserError(f"{path}: found {rest[:20]!r} behind the list, {expected}")


def text_of(entry: dict[str, Any], key: str, place: str) -> str:
    """A text of an entry.

    Raises:
        UserError: there is none, or it is empty, or no UTF-8 could hold it.
    """
    value = entry.get(key)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{place}: {key}: found {shown(value)}, expected a text")
    return checked_text(value, key, place)


def checked_text(value: str, key: str, place: str) -> str:
    """The text itself. Raises UserError where it holds half of a surrogate pair, on which tokenizers fail."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{place}: {key}: {value[error.start]!a} is no character; correct the file") from None
    return value


def _text(path: Path, option: str) -> str:
    try:
        return read_regular_text(path).removeprefix("\ufeff")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{option} {path}: cannot be read ({error})") from None


def _decoded(text: str, at: int, place: str) -> tuple[Any, int]:
    try:
        return json.JSONDecoder().raw_decode(text, at)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not valid JSON ({error})") from None


def _object(place: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{place}: found {shown(value)}, expected an object")
    return value


def _after_space(text: str, at: int) -> int:
    while at < len(text) and text[at] in _SPACE:
        at += 1
    return at


def shown(value: Any) -> str:
    """A value in a message."""
    text = json.dumps(value)
    return "nothing" if value is None else text if len(text) <= 40 else f"{text[:37]}..."
