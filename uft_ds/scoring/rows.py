"""The rows of a data set as groups of answers to score, read and checked as for training."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from uft_ds.data.example import Example, Message, Pair
from uft_ds.data.formats.columns import check_renaming, columns_of
from uft_ds.data.formats.fields import LeftOut, is_empty
from uft_ds.data.formats.guess import other_formats
from uft_ds.data.formats.items import items_of
from uft_ds.data.formats.scales import Scale, check_score_range
from uft_ds.data.formats.table import Format, format_named
from uft_ds.data.rows.reading import RawRow, SourceFiles, content_hash, find_data, parse_row, raw_rows
from uft_ds.data.rows.renaming import renamed
from uft_ds.errors import UserError
from uft_ds.scoring.item import Item

_Value = TypeVar("_Value")

_NAMED = 3
"""How many bad rows are named."""


@dataclass(frozen=True)
class Reading:
    """How the rows of a data set are read: the keys of a recipe's source.

    columns: (the format's name, the name in the data) of a column, or (name, None) of one that is left out.
    max_quarantined: the share of the rows that may be bad and are left out; None: a bad row is refused.
    path_key: the recipe's key of the path, which a refusal names; empty for a path of the command line.
    """

    path: str
    format: str
    split: str | None = None
    columns: tuple[tuple[str, str | None], ...] = ()
    score_range: Scale | None = None
    max_quarantined: float | None = None
    path_key: str = ""


BAD_ROW = "bad row"


@dataclass(frozen=True)
class Row:
    """The answers of one row.

    number: counted from 0. is_pair: they are the two sides of a pair, the preferred one first.
    given: the score of each answer in the data; None: the data has none. left_out: why it is not scored, or empty.
    first: the index of its first answer, if this is a part of a row. fault: of a bad row, what is wrong with it.
    """

    number: int
    place: str
    items: tuple[Item, ...]
    is_pair: bool
    given: tuple[float | None, ...]
    left_out: str = ""
    first: int = 0
    fault: str = ""

    def each(self) -> Iterator[Row]:
        """Each answer as a row of its own."""
        for index, (item, given) in enumerate(zip(self.items, self.given, strict=True)):
            yield Row(self.number, item.place, (item,), False, (given,), first=index)

    def own(self, values: tuple[_Value, ...]) -> tuple[_Value, ...]:
        """Of the values of the whole row, those of these answers."""
        return values[self.first : self.first + len(self.items)]

    @cached_property
    def key(self) -> str:
        """A hash of the contents that are scored, by which a judgement is known to be of this row."""
        digest = hashlib.sha256()
        for item in self.items:
            digest.update(json.dumps([written(item.messages), item.tools, item.response, item.meta]).encode())
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Counted:
    """Numbers of a data set. alone: rows of one answer, of which `alone_at` names the first few."""

    rows: int = 0
    answers: int = 0
    left_out: int = 0
    alone: int = 0
    alone_at: tuple[str, ...] = ()

    def with_row(self, row: Row) -> Counted:
        if row.left_out:
            return replace(self, rows=self.rows + 1, left_out=self.left_out + 1)
        is_alone = len(row.items) == 1
        return Counted(
            self.rows + 1,
            self.answers + len(row.items),
            self.left_out,
            self.alone + is_alone,
            (*self.alone_at, row.place) if is_alone and len(self.alone_at) < _NAMED else self.alone_at,
        )


class Rows:
    """The rows of a data set; each iteration reads them anew, so that few are in memory."""

    def __init__(self, reading: Reading) -> None:
        """
        Raises:
            UserError: there is no such data or format.
        """
        self._make = format_named(reading.format)
        self._data: SourceFiles = find_data(reading.path, reading.split, reading.path_key)
        check_renaming(reading.columns, self._make, self._data.label)
        check_score_range(reading.score_range, self._make, reading.format, self._data.label)
        self._reading = reading

    @property
    def label(self) -> str:
        return self._data.label

    def holds(self, file: Path) -> bool:
        """Whether a file would be among the data: where this is a folder, what is written into it is read."""
        folder = Path(self._reading.path)
        return folder.is_dir() and file.resolve().is_relative_to(folder.resolve())

    def identity(self) -> dict[str, Any]:
        """What the rows depend on: their content, not their file's name."""
        reading = self._reading
        return {
            "content": content_hash(self._data),
            "format": reading.format,
            "columns": [list(pair) for pair in reading.columns],
            "score_range": None if reading.score_range is None else list(reading.score_range),
        }

    def rows(self, limit: int | None = None) -> Iterator[Row]:
        """The first `limit` rows, in order.

        Raises:
            UserError: a bad row: file, line, what was found and what was expected.
        """
        for row in self._read(limit):
            if row.fault and self._reading.max_quarantined is None:
                raise UserError(f"{row.place}: {row.fault}")
            yield row

    def check(self, limit: int | None = None) -> Counted:
        """Read all rows once, before anything is scored.

        Raises:
            UserError: names the first bad rows and how many there are.
        """
        count, bad = Counted(), 0
        first: list[str] = []
        for row in self._read(limit):
            bad += bool(row.fault)
            count = count.with_row(row)
            if row.fault and len(first) < _NAMED:
                first.append(f"{row.place}: {row.fault}")
        most = self._reading.max_quarantined
        if bad and (most is None or bad > most * count.rows):
            lines = [f"{first[0]} (format {self._reading.format})"]
            further = ", the next:" if first[1:] else ""
            lines.append(f"{bad:,} of {count.rows:,} rows of {self.label} are bad{further}")
            lines += [f"  {other}" for other in first[1:]]
            lines.append(
                "correct them, or leave them out by --on-bad-row quarantine; or is it another --format? "
                "`uft data formats` describes all"
                if most is None
                else f"--max-quarantined {most:g} of the rows may be"
            )
            raise UserError("\n".join(lines))
        return count

    def _read(self, limit: int | None) -> Iterator[Row]:
        with closing(raw_rows(self._data)) as raws:
            for number, raw in enumerate(raws):
                if number == limit:
                    return
                place = self._data.place(raw.file, raw.line)
                try:
                    yield self._row(raw, number, place)
                except ValueError as error:
                    yield Row(number, place, (), False, (), BAD_ROW, fault=str(error))

    def _row(self, raw: RawRow, number: int, place: str) -> Row:
        reading = self._reading
        values = renamed(parse_row(raw.value), reading.columns)
        try:
            found = items_of(
                values, self._make, format=reading.format, score_range=reading.score_range, is_scored_anew=True
            )
        except LeftOut as left_out:
            return Row(number, place, (), False, (), left_out.reason)
        except ValueError as error:
            instead = "" if reading.columns or number else other_formats(values, reading.format)
            raise ValueError(f"{instead} (read as {reading.format}: {error})" if instead else error) from None
        is_pair = isinstance(found[0], Pair) if found else False
        examples = [
            example
            for item in found
            for example in ((item.chosen, item.rejected) if isinstance(item, Pair) else (item,))
        ]
        is_given = bool(found) and _has_scores(found[0])
        answers = [(example, index) for example in examples for index in _scored_turns(example)]
        meta = _meta(values, self._make)
        items, reasons = [], []
        for count, (example, index) in enumerate(answers, start=1):
            where = place if len(answers) == 1 else f"{place} answer {count}"
            turn = example.messages[index]
            reasons.append(_unwritable(turn))
            items.append(Item(where, _plain(example.messages[:index]), turn.content, meta, example.tools, number))
        given = tuple(example.messages[index].score if is_given else None for example, index in answers)
        reason = next(filter(None, reasons), "" if items else "no answer")
        return Row(number, place, tuple(items), is_pair, given, reason)


def _has_scores(item: Example | Pair) -> bool:
    return item.scored if isinstance(item, Pair) else item.kind != "instruction"


def _scored_turns(example: Example) -> list[int]:
    return [index for index, turn in enumerate(example.messages) if turn.score is not None]


def _unwritable(turn: Message) -> str:
    """Why our jsonl cannot hold a score for this answer; empty if it can."""
    if turn.tool_calls:
        return "the answer calls a tool"
    if turn.extras:
        return f"the answer has {', '.join(name for name, _ in turn.extras)} beside its text"
    return ""


def _plain(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    return tuple(Message(m.role, m.content, tool_calls=m.tool_calls, extras=m.extras) for m in messages)


def _meta(row: Mapping[str, Any], make: Format) -> Mapping[str, Any]:
    """What a row says besides its turns, as plain JSON values."""
    columns = columns_of(make)
    if columns is not None and "meta" in columns:
        given = row.get("meta")
        if given is None:
            return {}
        return _as_json(given if isinstance(given, Mapping) else {"meta": given})
    read = columns or ()
    rest = {key: value for key, value in row.items() if key not in read and not is_empty(value)}
    nested = rest.get("meta")
    if isinstance(nested, Mapping):  # as in jsonl: what is in it is meant, not that it is there
        rest = {key: value for key, value in rest.items() if key != "meta"} | dict(nested)
    return _as_json(rest)


def _as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """As plain JSON: Parquet files have dates, which become text, and NaN for what is missing, which becomes null."""
    written = json.dumps(dict(values), default=str, ensure_ascii=False)
    plain: dict[str, Any] = json.loads(written, parse_constant=lambda name: None)
    return plain


def written(messages: tuple[Message, ...]) -> list[dict[str, Any]]:
    """Turns as our jsonl and chat templates hold them."""
    return [
        {"role": m.role, "content": m.content}
        | dict(m.extras)
        | ({"tool_calls": [dict(call) for call in m.tool_calls]} if m.tool_calls else {})
        for m in messages
    ]
