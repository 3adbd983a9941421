"""Scored rows in our own format, jsonl: ready for a recipe's source."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from uft_ds.data.formats.fields import LeftOut
from uft_ds.data.formats.jsonl import jsonl
from uft_ds.scoring.isotonic import META_KEY
from uft_ds.scoring.item import Item
from uft_ds.scoring.rows import Row, written


class NotWritable(ValueError):
    """A scored row that our format has no place for."""


def output_rows(
    row: Row, raw: tuple[float, ...], scores: tuple[float, ...], scoring: dict[str, Any], *, split_pairs: bool
) -> list[dict[str, Any]]:
    """The rows of the output that a row with its scores becomes: a pair stays one, with the better side as `chosen`.

    Args:
        raw, scores: of each answer, the latter from 0 to 1. scoring: what `meta` says of the scorer.
    Raises:
        NotWritable: our own reader does not take it.
    """
    if row.is_pair and not split_pairs:
        rows = [_pair(row, raw, scores, scoring)]
    else:
        answers = zip(row.items, raw, scores, row.given, strict=True)
        rows = [
            _prompt(item)
            | {"response": item.response, "score": score}
            | _meta(item, {**scoring, "raw": value, **_given(given)})
            for item, value, score, given in answers
        ]
    for made in rows:
        try:
            list(jsonl(made, score=None))
        except LeftOut as error:
            raise NotWritable(error.reason) from None
        except ValueError as error:
            raise NotWritable(f"format jsonl does not take it: {error}") from None
    return rows


def _pair(row: Row, raw: tuple[float, ...], scores: tuple[float, ...], scoring: dict[str, Any]) -> dict[str, Any]:
    order = (0, 1) if scores[0] >= scores[1] else (1, 0)
    better, worse = (row.items[index] for index in order)
    said = {
        **scoring,
        "raw": [raw[index] for index in order],
        **({} if row.given[0] is None else {"given": [row.given[index] for index in order]}),
        "swapped": order == (1, 0),
    }
    return (
        _prompt(better)
        | {"chosen": better.response, "rejected": worse.response}
        | {"score_chosen": scores[order[0]], "score_rejected": scores[order[1]]}
        | _meta(better, said)
    )


def _prompt(item: Item) -> dict[str, Any]:
    first = item.messages[0]
    if len(item.messages) == 1 and first.role == "user" and not first.extras and not item.tools:
        return {"prompt": first.content}
    tools = {"tools": [dict(tool) for tool in item.tools]} if item.tools else {}
    return {"messages": written(item.messages), **tools}


def _given(given: float | None) -> dict[str, float]:
    return {} if given is None else {"given": given}


def _meta(item: Item, scoring: dict[str, Any]) -> dict[str, Any]:
    return {"meta": {**item.meta, META_KEY: scoring}}


def lines_of(rows: Iterable[dict[str, Any]]) -> Iterator[str]:
    """The text of the output, a line for each row."""
    for row in rows:
        yield json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
