"""The scale of the scores in a row, and where a row has them.

A format declares both by `scored`. It then takes the source's `score_range`, which replaces its own scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from uft_ds.data.formats.fields import OfThisFormat, Row, is_number_in_quotes, shown
from uft_ds.errors import UserError

Scale = tuple[float, float]
"""(lowest, highest) score that there may be."""

UNIT: Scale = (0.0, 1.0)

_Format = TypeVar("_Format", bound=Callable[..., Any])


def scored(*places: str, scale: Scale) -> Callable[[_Format], _Format]:
    """Declare where the rows of a format have scores, and on which scale if the source's `score_range` gives no other.

    A format with several layouts is decorated once for each: of a row, the uppermost that it has counts.

    Args:
        places: columns; `a.b` is key b of column a, and `a[].b` that key of each of a's members.
    """

    def declared(make: _Format) -> _Format:
        make.scored = ((places, scale), *_layouts(make))  # type: ignore[attr-defined]
        return make

    return declared


def checked_score(value: Any, name: str = "score", scale: Scale = UNIT) -> float:
    """A score given in the data, mapped linearly from its scale to [0, 1].

    Raises:
        ValueError: it is no number, or not on the scale; nothing is clipped.
    """
    low, high = scale
    # The comparison refuses NaN, too.
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        wrong = f"{name!r}: found {shown(value)}, expected a number from {low:g} to {high:g}"
        if value is None:
            raise ValueError(wrong)
        raise OfThisFormat(f"{wrong}: write it without quotes" if is_number_in_quotes(value) else wrong)
    return float((value - low) / (high - low))


def given_scores(row: Row, make: Callable[..., Any], score_range: Scale | None) -> tuple[list[float], int]:
    """The numbers that a row has where its format reads scores, and how many of them are not on its scale."""
    for places, scale in _layouts(make):
        values = [value for place in places for value in _values_at(row, place.split(".")) if value is not None]
        if values:
            low, high = score_range or scale
            found = [
                float(value)
                for value in values
                if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            ]
            return found, sum(not low <= value <= high for value in found)
    return [], 0


def check_score_range(score_range: Scale | None, make: Callable[..., Any], name: str, label: str) -> None:
    """Refuse a source's `score_range` if its format reads no scores, or has a scale that is part of its definition.

    Raises:
        UserError: names the source and the format.
    """
    if score_range is not None and not _layouts(make):
        raise UserError(
            f"{label}: `score_range` given, but format {name} reads no scores on a scale that could be another; "
            "formats that do: jsonl, ultrafeedback, ultrafeedback_binarized"
        )


def _layouts(make: Callable[..., Any]) -> tuple[tuple[tuple[str, ...], Scale], ...]:
    return getattr(make, "scored", ())


def _values_at(value: Any, keys: list[str]) -> Iterator[Any]:
    if not keys:
        yield value
    elif isinstance(value, Mapping):
        inner = value.get(keys[0].removesuffix("[]"))
        members = inner if keys[0].endswith("[]") and isinstance(inner, list) else [inner]
        for member in members:
            yield from _values_at(member, keys[1:])
