"""Checked access to the fields of a row, for the source formats.

Each function raises ValueError with what was found and what was expected; the caller adds the place of the row.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

Row = Mapping[str, Any]


class LeftOut(Exception):
    """A good row with nothing to train on. It is counted by its reason; unlike a bad row, it is no fault."""

    def __init__(self, reason: str, num_responses: int) -> None:
        super().__init__(reason)
        self.reason = reason
        self.num_responses = num_responses


class OfThisFormat(ValueError):
    """A row of the right format that is bad; the message says what to do about it."""


class UnknownKey(ValueError):
    """A format that knows all its keys found another one; the message says what to do about it."""


class KnownKey(UnknownKey, OfThisFormat):
    """The same, of a key that is known by another spelling or name."""


def text(row: Row, key: str) -> str:
    """A field that must hold text that is not empty."""
    return not_turns(checked_text(row.get(key), key), key)


_SPEAKER = r"""["'](role|from)["']\s*:\s*["'](system|developer|user|human|assistant|gpt|tool)["']"""
_STORED_TURNS = re.compile(rf"""\s*\[\s*\{{(?=.*?{_SPEAKER})(?=.*?["'](content|value)["']\s*:)""", re.DOTALL)


def not_turns(value: str, name: str) -> str:
    """The text, checked not to be a list of turns that was stored as text: csv files and some exports do so.

    Trained on as it is, the model would learn to write JSON.

    Raises:
        ValueError: it begins as such a list does, in JSON or as Python prints one.
    """
    if _STORED_TURNS.match(value) and value.rstrip().endswith("]"):
        raise ValueError(
            f"{name!r}: holds turns that were stored as text ({shown(value)}); store them as a list "
            "[{role, content}, ...], or their text alone; an answer that is such a text is given in `messages`"
        )
    return value


def optional_text(row: Row, key: str) -> str | None:
    """A field that may be absent, null or empty; all three give None."""
    return text(row, key) if row.get(key) not in (None, "") else None


def checked_text(value: Any, name: str, *, may_be_empty: bool = False) -> str:
    """The value, checked to be text that is not blank and has no NUL characters or lone surrogates."""
    if not isinstance(value, str):
        raise ValueError(f"{name!r}: expected text, found {'nothing' if value is None else shown(value)}")
    if not may_be_empty and not value.strip():
        raise ValueError(f"{name!r} is empty")
    if "\0" in value:
        raise ValueError(f"{name!r}: holds a NUL character; binary data or a broken conversion")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{name!r}: holds half of a surrogate pair, which no encoding can store") from None
    return value


def content(value: Any, name: str = "content", *, may_be_empty: bool = False) -> str:
    """The content of a turn: text, or OpenAI's list of parts if all of them are text."""
    if not isinstance(value, list):
        return checked_text(value, name, may_be_empty=may_be_empty)
    texts = []
    for index, part in enumerate(value):
        if not isinstance(part, Mapping) or part.get("type") != "text":
            found = shown(part.get("type")) if isinstance(part, Mapping) else shown(part)
            raise ValueError(f"{name!r}, part {index}: found {found}; only parts of type 'text' are supported")
        texts.append(checked_text(part.get("text"), "text", may_be_empty=True))
    return checked_text("".join(texts), name, may_be_empty=may_be_empty)


def default_score(score: float | None) -> float:
    """The score of instruction data: the source's, or 1 (UFT Eq. 7)."""
    return 1.0 if score is None else score


def label_score(row: Row) -> float:
    """Binary feedback: `label` true is 1, false is 0. Numbers are refused, because some data sets use -1 and 1."""
    label = row.get("label")
    if not isinstance(label, bool):
        wrong = f"'label': found {shown(label)}, expected true or false"
        if label in (0, 1):
            raise OfThisFormat(f"{wrong}: write 1 as true and 0 as false")
        if isinstance(label, str) and label.strip().lower() in ("true", "false"):
            raise OfThisFormat(f"{wrong}: write it without quotes")
        raise ValueError(wrong) if label is None else OfThisFormat(wrong)
    return float(label)


def mapping(value: Any, name: str) -> Mapping[str, Any]:
    """The value, checked to be a JSON object that can be written into a prompt."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{name!r}: expected an object, found {shown(value)}")
    try:
        written = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{name!r}: cannot be written as JSON ({error})") from None
    checked_text(written, name)
    return value


def from_json(value: Any, name: str) -> Any:
    """The value, decoded if it is JSON text: columns without a fixed schema are often stored as text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name!r}: expected JSON, found {shown(value)} ({error})") from None


def present(row: Row) -> set[str]:
    """The keys whose value is not null. Arrow fills a missing column with null, so null means absent."""
    return {key for key, value in row.items() if value is not None}


def is_empty(value: Any) -> bool:
    """Whether a value says nothing: null, empty text, or a list or object of nothing else."""
    if isinstance(value, Mapping):
        return all(map(is_empty, value.values()))
    return all(map(is_empty, value)) if isinstance(value, list | tuple) else value is None or value == ""


def is_number_in_quotes(value: Any) -> bool:
    """Whether a value is text that holds a finite number and nothing else."""
    try:
        return isinstance(value, str) and math.isfinite(float(value))
    except ValueError:
        return False


def shown(value: Any) -> str:
    """The beginning of a value, as messages quote it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else repr(value)[:40]
