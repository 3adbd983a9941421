"""What became of the rows of a source: how many were read, left out or changed, and the scores that they give."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ScoresGiven:
    """The lowest and the highest score that the rows give, bad rows included, before any map.

    count, outside: how many scores there are, and how many of them are not on the source's scale. A store that was
        written before they were counted has the count 0, and outside 1 if any is.
    """

    low: float
    high: float
    count: int
    outside: int

    @staticmethod
    def of(scores: list[float], outside: int) -> ScoresGiven:
        return ScoresGiven(min(scores), max(scores), len(scores), outside)

    @staticmethod
    def from_json(values: dict[str, Any]) -> ScoresGiven:
        """The scores of an account in JSON. Older versions also wrote `is_outside`, and the first no counts."""
        given = {**values}
        is_outside = given.pop("is_outside", False)
        return ScoresGiven(**{"count": 0, "outside": int(is_outside)} | given)

    def joined(self, other: ScoresGiven | None) -> ScoresGiven:
        """The same of both."""
        if other is None:
            return self
        return ScoresGiven(
            min(self.low, other.low),
            max(self.high, other.high),
            self.count + other.count,
            self.outside + other.outside,
        )


@dataclass(frozen=True)
class Account:
    """Drop statistics of a source's rows.

    rows: all rows that were read.
    dropped, changed: number of responses by reason.
    places: (file, line) of the first rows for each reason.
    quarantined: number of bad rows.
    skipped: number of rows that `where` does not select.
    unread: number of rows by the name of each column that the format does not read.
    scores: None if no row has a score of its own.
    """

    rows: int
    dropped: dict[str, int]
    changed: dict[str, int]
    places: dict[str, tuple[tuple[int, int], ...]]
    quarantined: int
    skipped: int
    unread: dict[str, int] = field(default_factory=dict)
    scores: ScoresGiven | None = None

    @staticmethod
    def from_json(values: dict[str, Any]) -> Account:
        """What `dataclasses.asdict` and JSON made of an account.

        Raises:
            TypeError: the values are not those of an account.
        """
        scores = values.get("scores")
        return Account(**values | {"scores": None if scores is None else ScoresGiven.from_json(scores)})
