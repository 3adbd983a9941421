"""How long a model's answers are, and how many of them are no whole answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from uft_ds.evaluation.benchmarks.question import Answer

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


@dataclass(frozen=True)
class Lengths:
    """answers: of all turns. characters, tokens: mean and quantiles. unfinished, empty: shares of the answers.

    An unfinished answer has met the limit of tokens before its end.
    """

    answers: int
    mean_characters: float
    characters: tuple[float, ...]
    mean_tokens: float
    tokens: tuple[float, ...]
    unfinished: float
    empty: float

    def plain(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_plain(cls, value: Mapping[str, Any]) -> Lengths:
        tuples = {name: tuple(value[name]) for name in ("characters", "tokens")}
        return cls(**{**value, **tuples})


def lengths_of(answers: Sequence[Answer]) -> Lengths:
    """The lengths of all turns of these answers, of which there is one at least."""
    texts = [text for answer in answers for text in answer.turns]
    characters = [len(text) for text in texts]
    tokens = [count for answer in answers for count in answer.tokens]
    unfinished = [not ended for answer in answers for ended in answer.are_ended]
    return Lengths(
        len(texts),
        float(np.mean(characters)),
        tuple(np.quantile(characters, QUANTILES).tolist()),
        float(np.mean(tokens)),
        tuple(np.quantile(tokens, QUANTILES).tolist()),
        float(np.mean(unfinished)),
        float(np.mean([not text for text in texts])),
    )
