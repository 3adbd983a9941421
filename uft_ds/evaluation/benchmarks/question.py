"""A benchmark's question, and a model's answer to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Benchmark = Literal["mt_bench", "alpaca_eval"]


@dataclass(frozen=True)
class Question:
    """What a model is asked.

    key: unlike that of any other question of the file: MT-Bench's question_id, AlpacaEval's place in its list from 0.
    place: where it stands, `file:line`. turns: the user's, in order; each is asked after the answer to the one before.
    category: empty where a benchmark has none. source: its entry in the file.
    """

    key: int
    place: str
    turns: tuple[str, ...]
    category: str = ""
    source: Mapping[str, Any] = field(default_factory=dict, hash=False, compare=False)


@dataclass(frozen=True)
class Answer:
    """A model's answers to the turns of one question.

    tokens: of each answer, without the one that ends it. are_ended: whether each has ended by itself, and not at the
    limit of tokens.
    """

    key: int
    turns: tuple[str, ...]
    tokens: tuple[int, ...]
    are_ended: tuple[bool, ...]
