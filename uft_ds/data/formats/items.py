"""The examples or pairs of one row, checked: what a format made of it, and that no meaning of the row was lost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from uft_ds.data.example import Pair
from uft_ds.data.formats.columns import refused_columns
from uft_ds.data.formats.fields import LeftOut, Row, UnknownKey
from uft_ds.data.formats.scales import Scale
from uft_ds.data.formats.table import Format
from uft_ds.data.formats.turns import Item, check_item


def items_of(
    row: Row,
    make: Format,
    *,
    format: str,  # noqa: A002 - the recipe's word
    score: float | None = None,
    score_range: Scale | None = None,
    is_scored_anew: bool = False,
) -> list[Item]:
    """The items of one row.

    Args:
        score: the source's constant for rows without a score. score_range: its scale, if not the format's own.
        is_scored_anew: the scores come from elsewhere, so a column that may hold a score loses nothing.
    Raises:
        LeftOut: a good row with nothing to train on.
        ValueError: a bad row.
    """
    try:
        items = list(_made(make, row, format, score, score_range))
    except (LeftOut, UnknownKey):
        raise  # the latter says what there is to say about columns
    except ValueError as error:
        unread = refused_columns(row, make, has_feedback=True)
        raise (ValueError(f"{error}; {unread}") if unread else error) from None
    except Exception as error:  # of another package's format
        raise ValueError(f"the format could not read it ({type(error).__name__}: {str(error)[:80]})") from error
    for item in items:
        check_item(item)
    given = {described(item) for item in items}
    if len(given) > 1:
        raise ValueError(f"format {format} gives items of several kinds: {', '.join(sorted(given))}")
    if unread := refused_columns(row, make, has_feedback=is_scored_anew or "instruction" not in given):
        raise ValueError(unread)
    return items


def described(item: Item) -> str:
    """The kind of an item; pairs with scores and pairs without are two kinds."""
    if isinstance(item, Pair):
        return "pair with scores" if item.scored else "pair"
    return item.kind


def _made(make: Format, row: Row, name: str, score: float | None, score_range: Scale | None) -> Iterable[Item]:
    scale: dict[str, Any] = {} if score_range is None else {"score_range": score_range}
    items = make(row, score=score, **scale)
    if not isinstance(items, Iterable) or isinstance(items, str | Mapping):
        raise ValueError(f"format {name} gives {type(items).__name__}; expected a list of examples or pairs")
    return items
