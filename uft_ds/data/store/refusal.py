"""Why a source with bad rows is refused: the first ones, how many there are, and what to do."""

from __future__ import annotations

from dataclasses import dataclass, field

from uft_ds.data.store.account import Account, ScoresGiven
from uft_ds.errors import UserError

PLACES_NAMED = 3
"""How many places are named of rows with the same fate."""
_LONG = 60
"""Letters of a reason that is not repeated word for word."""


@dataclass
class BadRows:
    """The bad rows that are found while a source is read.

    label, format: of the source.
    first: place and reason of the first ones.
    of_this_format: how many are of the format, and their messages say what to do.
    ended_by: why the source was not read to its end; empty if it was.
    """

    label: str
    format: str
    first: list[tuple[str, str]] = field(default_factory=list)
    count: int = 0
    of_this_format: int = 0
    ended_by: str = ""

    def add(self, place: str, reason: str) -> None:
        self.count += 1
        if len(self.first) < PLACES_NAMED:
            self.first.append((place, reason))

    def error(self, account: Account) -> UserError:
        """The refusal. account: of all rows that have been read."""
        (place, why), *others = self.first
        read = f"the first {account.rows:,}" if self.ended_by else f"{account.rows:,}"
        lines = [
            f"{place}: {why} (format {self.format})",
            f"{self.count:,} of {read} rows of {self.label} are bad{', the next:' if others else ''}",
            *(f"  {other}: {'the same' if reason == why and len(why) > _LONG else reason}" for other, reason in others),
        ]
        if self.ended_by:
            lines.append(self.ended_by)
        remedy = self._remedy(account)
        return UserError("\n".join([*lines, remedy] if remedy else lines))

    def _remedy(self, account: Account) -> str:
        """What to do; empty if the reasons have said it."""
        if hint := range_hint(self.label, account.scores):
            return hint
        if self.count > 1 and 2 * self.count > account.rows:
            if 2 * self.of_this_format > account.rows:
                return ""  # the messages say it; so many rows are not left out
            return f"these are most of the rows: are they of format {self.format}? `uft data formats` describes all"
        return (
            "correct them, or set data.on_bad_row: quarantine to leave them out (of a source's rows at most the share "
            "data.max_quarantined)"
        )


def range_hint(label: str, scores: ScoresGiven | None) -> str:
    """What to do about scores that are not on the source's scale; empty if there are none."""
    if scores is None or not scores.outside:
        return ""
    low, high = scores.low, scores.high
    usual = next(((start, end) for start, end in _USUAL_SCALES if start <= low and high <= end), None)
    # Where most scores are on their scale, the others are slips of single rows: a scale that is wide enough for a 100
    # among scores from 0 to 1 would make all of them next to nothing.
    example = f", as in score_range: {list(usual)}" if usual and 2 * scores.outside >= scores.count else ""
    found = f"{scores.outside:,} of {scores.count:,} scores" if scores.count else "scores"
    return (
        f"{label}: {found} outside of its scale; all are from {_exactly(low)} to {_exactly(high)}: correct the rows, "
        "or, if all its scores are on another scale, set this source's score_range to the lowest and the highest score "
        f"of that scale{example}"
    )


_USUAL_SCALES = ((0, 1), (-1, 1), (1, 5), (0, 4), (0, 5), (1, 10), (0, 10), (-10, 10), (0, 100))
"""The narrower ones first. A scale for scores that none of them takes, such as a reward model's, is not guessed."""


def _exactly(score: float) -> str:
    """All digits: a scale that ends at a rounded score would leave out the score that it was rounded from."""
    return repr(score).removesuffix(".0")
