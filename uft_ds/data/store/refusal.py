"""Why a source with bad rows is refused: the first ones, how many there are, and what to do."""

from __future__ import annotations

from dataclasses import dataclass, field

from uft_ds.data.store.sequences import Account, ScoresGiven
from uft_ds.errors import UserError

PLACES_NAMED = 3
"""How many places are named of rows with the same fate."""


@dataclass
class BadRows:
    """The bad rows that are found while a source is read.

    label, format: of the source.
    first: place and reason of the first ones.
    ended_by: why the source was not read to its end; empty if it was.
    """

    label: str
    format: str
    first: list[str] = field(default_factory=list)
    count: int = 0
    ended_by: str = ""

    def add(self, place: str, reason: str) -> None:
        self.count += 1
        if len(self.first) < PLACES_NAMED:
            self.first.append(f"{place}: {reason}")

    def error(self, account: Account) -> UserError:
        """The refusal. account: of all rows that have been read."""
        first, *others = self.first
        read = f"the first {account.rows:,}" if self.ended_by else f"{account.rows:,}"
        lines = [
            f"{first} (format {self.format})",
            f"{self.count:,} of {read} rows of {self.label} are bad{', the next:' if others else ''}",
            *(f"  {other}" for other in others),
        ]
        if self.ended_by:
            lines.append(self.ended_by)
        return UserError("\n".join([*lines, self._remedy(account)]))

    def _remedy(self, account: Account) -> str:
        if hint := range_hint(self.label, account.scores):
            return hint
        if self.count > 1 and 2 * self.count > account.rows:
            return f"these are most of the rows: are they of format {self.format}? `uft data formats` describes all"
        return (
            "correct them, or set data.on_bad_row: quarantine to leave them out (of a source's rows at most the share "
            "data.max_quarantined)"
        )


def range_hint(label: str, scores: ScoresGiven | None) -> str:
    """What to do about scores that are not on the source's scale; empty if there are none."""
    if scores is None or not scores.is_outside:
        return ""
    low, high = scores.low, scores.high
    # One score alone is no scale; it is shown as the end of one.
    example = (low, high) if low < high else (min(low, 0.0), max(high, 1.0))
    return (
        f"the scores of {label} are from {_exactly(low)} to {_exactly(high)}: correct the rows, or, if all its scores "
        "are on another scale, set this source's score_range to the lowest and the highest score of that scale, as in "
        f"score_range: [{', '.join(map(_exactly, example))}]"
    )


def _exactly(score: float) -> str:
    """All digits: a rounded end of a scale would leave out the score that it was rounded from."""
    return repr(score).removesuffix(".0")
