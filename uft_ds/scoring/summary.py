"""What a scored data set looks like in numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np

from uft_ds.scoring.item import NO_TOKENS, Tokens
from uft_ds.scoring.record import Scored

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


@dataclass(frozen=True)
class Summary:
    """answers: those that were to be scored. scored, failed: with a score and without; they add up to it.

    mean, quantiles: of the scores; raw_mean, raw_quantiles: before the map. All None or empty without a score.
    reasons: of failures, with their counts. left_out: rows, by reason. notes: such as contradictions.
    spent: tokens of all runs for this output. remembered: tokens of replies that were kept from other runs.
    """

    scorer: str
    answers: int
    scored: int
    failed: int
    mean: float | None
    quantiles: tuple[float, ...]
    raw_mean: float | None
    raw_quantiles: tuple[float, ...]
    reasons: Mapping[str, int] = field(default_factory=dict, hash=False)
    left_out: Mapping[str, int] = field(default_factory=dict, hash=False)
    notes: Mapping[str, int] = field(default_factory=dict, hash=False)
    spent: Tokens = NO_TOKENS
    remembered: Tokens = NO_TOKENS

    def plain(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_plain(cls, value: Mapping[str, Any]) -> Summary:
        known = {one.name: value[one.name] for one in fields(cls)}
        for name in ("spent", "remembered"):
            known[name] = Tokens(**known[name])
        for name in ("quantiles", "raw_quantiles"):
            known[name] = tuple(known[name])
        return cls(**known)


def summary_of(
    scores_R: Sequence[float],
    raw_R: Sequence[float],
    reasons: Counter[str],
    left_out: Counter[str],
    scored: Sequence[Scored],
    of_scorer: tuple[str, Tokens],
) -> Summary:
    """The summary of scores, raw values ([scored answers] each) and failures by reason.

    Args:
        of_scorer: its name, and the tokens that were spent.
    """
    name, spent = of_scorer
    remembered = sum((row.remembered for row in scored), NO_TOKENS)
    notes = Counter(note for row in scored for note in row.notes)
    failed = sum(reasons.values())
    return Summary(
        name,
        len(scores_R) + failed,
        len(scores_R),
        failed,
        *_figures(scores_R),
        *_figures(raw_R),
        dict(reasons.most_common()),
        dict(left_out),
        dict(notes),
        spent,
        remembered,
    )


def _figures(values: Sequence[float]) -> tuple[float | None, tuple[float, ...]]:
    if not values:
        return None, ()
    return float(np.mean(values)), tuple(np.quantile(values, QUANTILES).tolist())
