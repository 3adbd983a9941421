"""What scorers are given and give back. A scorer returns a number or says why there is none; a failure is never a 0."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from uft_ds.data.example import Message


@dataclass(frozen=True)
class Item:
    """One answer to score.

    place: of its row, `file:line`, with the answer's number if the row holds several.
    messages: the turns before the answer, the last one the user's or a tool's.
    meta: what the row says besides: `meta` of jsonl, the columns that are not read of another format.
    row: the row's number, counted from 0. Answers of one row follow each other.
    """

    place: str
    messages: tuple[Message, ...]
    response: str
    meta: Mapping[str, Any] = field(default_factory=dict, hash=False)
    tools: tuple[Mapping[str, Any], ...] = field(default=(), hash=False)
    row: int = 0


@dataclass(frozen=True)
class Tokens:
    """Tokens of a judge's requests and replies, as the endpoint counts them."""

    prompt: int = 0
    completion: int = 0

    def __add__(self, other: Tokens) -> Tokens:
        return Tokens(self.prompt + other.prompt, self.completion + other.completion)

    @property
    def total(self) -> int:
        return self.prompt + self.completion


NO_TOKENS = Tokens()


@dataclass(frozen=True)
class Judgement:
    """What a scorer found of one item.

    value: the score on the scorer's own scale; None: it failed.
    reason: why it failed. reply: what the scorer said, word for word where it said something.
    spent: tokens that were asked for it now. remembered: tokens of replies that were kept from an earlier request.
    notes: facts that the summary counts, such as "contradiction".
    """

    value: float | None
    reason: str = ""
    reply: str = ""
    spent: Tokens = NO_TOKENS
    remembered: Tokens = NO_TOKENS
    notes: tuple[str, ...] = ()


def found(value: float, reply: str = "", **further: Any) -> Judgement:
    """A judgement with a number; a number that is not finite is a failure."""
    if not math.isfinite(value):
        return failed(f"the score is {value}, expected a finite number", reply, **further)
    return Judgement(float(value), reply=reply, **further)


def failed(reason: str, reply: str = "", **further: Any) -> Judgement:
    """A judgement without a number."""
    return Judgement(None, reason, reply, **further)


class Scorer(Protocol):
    """Scores answers, a few at a time.

    batch_items: how many items it likes to be given at once.
    """

    batch_items: int

    def identity(self) -> Mapping[str, Any]:
        """All that its scores depend on besides the items, as plain values; equal identities give equal scores."""

    def score(self, items: Sequence[Item]) -> list[Judgement]:
        """One judgement for each item, in order. All answers of a row are in one call.

        Raises:
            UserError: no item can be scored, as with a wrong key of a judge.
            CheckFailed: it may not go on, as when the cost limit is reached.
        """

    def close(self) -> None:
        """End what it has started."""


def scorer_name(identity: Mapping[str, Any]) -> str:
    """A short name with a hash of the whole identity, as rows hold it: `judge:gpt#1f2e3d4c5b6a`."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return f"{identity['scorer']}#{digest[:12]}"
