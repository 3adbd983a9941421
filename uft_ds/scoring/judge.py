"""Scores by a language model that is asked for its verdict: one answer at a time, or two answers in both orders."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, groupby
from typing import Any

from uft_ds.scoring.asking import ANY_NONCE, Chat, Judge, Question
from uft_ds.scoring.item import Item, Judgement, Tokens, failed, found
from uft_ds.scoring.questions import Template, grade_rule, preference_rule
from uft_ds.scoring.verdict import grade_in, preference_in

CONTRADICTION = "contradiction"
"""Counted: a comparison in which the first answer won, or the second, in both orders."""


@dataclass(frozen=True)
class Rubric:
    """What is asked for. scale: of a grade; without use where answers are compared."""

    template: Template
    scale: tuple[float, float] = (1.0, 10.0)

    def rule(self, nonce: str) -> str:
        return preference_rule(nonce) if self.template.compares else grade_rule(nonce, *self.scale)

    def value_in(self, reply: str, nonce: str) -> float:
        """The verdict of a reply. Raises ValueError if there is none."""
        return preference_in(reply, nonce) if self.template.compares else grade_in(reply, nonce, *self.scale)


class JudgeScorer:
    """Asks a judge. What it has said is kept, so an item that is scored again costs nothing."""

    def __init__(self, judge: Judge, rubric: Rubric) -> None:
        self._judge, self._rubric = judge, rubric
        self.budget = judge.budget
        self.batch_items = 4 * judge.concurrency

    def identity(self) -> Mapping[str, Any]:
        template, endpoint = self._rubric.template, self._judge.endpoint
        return {
            "scorer": f"{'pairwise judge' if template.compares else 'judge'}:{endpoint.body['model']}",
            "url": endpoint.url,
            "body": {name: value for name, value in endpoint.body.items() if value is not None},
            "template_sha256": hashlib.sha256(template.text.encode()).hexdigest(),
            "rule": self._rubric.rule(ANY_NONCE),
        }

    def score(self, items: Sequence[Item]) -> list[Judgement]:
        if self._rubric.template.compares:
            return self._compared(items)
        return self._judge.ask(list(self._questions(items)))

    def close(self) -> None:
        self._judge.close()

    @property
    def repeated(self) -> int:
        """How many requests were sent again because of an error."""
        return self._judge.repeated

    def plan(self, items: Sequence[Item]) -> list[tuple[str, Tokens, bool]]:
        """Each question that `score` would ask: its text, the tokens that it may take, and whether a reply is kept."""
        return self._judge.plan(list(self._questions(items)))

    def _questions(self, items: Sequence[Item]) -> Iterator[Question]:
        if not self._rubric.template.compares:
            yield from (self._question(item, (item.response,)) for item in items)
            return
        for a, b in _duels(items):
            yield self._question(items[a], (items[a].response, items[b].response))
            yield self._question(items[a], (items[b].response, items[a].response))

    def _compared(self, items: Sequence[Item]) -> list[Judgement]:
        """The mean share of each answer in its comparisons with the other answers of its row."""
        duels = list(_duels(items))
        verdicts = self._judge.ask(list(self._questions(items)))
        sides: list[list[Judgement]] = [[] for _ in items]
        for number, (a, b) in enumerate(duels):
            first, second = _share_of_first(*verdicts[2 * number : 2 * number + 2])
            sides[a].append(first)
            sides[b].append(second)
        return [
            _mean(of_one) if of_one else failed("no other answer in its row to compare it with") for of_one in sides
        ]

    def _question(self, item: Item, answers: tuple[str, ...]) -> Question:
        rubric = self._rubric

        def chat(nonce: str) -> Chat:
            text = rubric.template.filled(nonce, item.messages, answers, item.meta, rubric.rule(nonce))
            return [{"role": "user", "content": text}]

        texts = (*answers, *(message.content for message in item.messages), *map(str, item.meta.values()))
        return Question(chat, rubric.value_in, (rubric.template.text, *texts))


def _duels(items: Sequence[Item]) -> Iterator[tuple[int, int]]:
    """Indices of each two answers of one row to one prompt."""
    for _, numbered in groupby(enumerate(items), key=lambda pair: (pair[1].row, pair[1].messages)):
        yield from combinations([index for index, _ in numbered], 2)


def _share_of_first(in_order: Judgement, turned: Judgement) -> tuple[Judgement, Judgement]:
    """Both answers' shares from the two orders: 1 for a win, 0.5 for a tie, the mean of both orders."""
    spent, remembered = in_order.spent + turned.spent, in_order.remembered + turned.remembered
    reply = f"{in_order.reply}\n--- in the other order ---\n{turned.reply}"
    if in_order.value is None or turned.value is None:
        lost = failed(in_order.reason or turned.reason, reply)
        return replace(lost, spent=spent, remembered=remembered), lost
    contradicts = {in_order.value, turned.value} <= {0.0, 1.0} and in_order.value == turned.value
    first = (in_order.value + 1 - turned.value) / 2
    notes = (CONTRADICTION,) if contradicts else ()
    # What the two requests took counts once.
    return found(first, reply, spent=spent, remembered=remembered, notes=notes), found(1 - first, reply)


def _mean(judgements: Sequence[Judgement]) -> Judgement:
    def total(of: Callable[[Judgement], Tokens]) -> Tokens:
        tokens = Tokens()
        for judgement in judgements:
            tokens = tokens + of(judgement)
        return tokens

    reply = "\n=== \n".join(judgement.reply for judgement in judgements)
    notes = tuple(note for judgement in judgements for note in judgement.notes)
    value = None
    lost = next((judgement for judgement in judgements if judgement.value is None), None)
    if lost is None:
        value = sum(judgement.value or 0.0 for judgement in judgements) / len(judgements)
    return Judgement(
        value,
        "" if lost is None else lost.reason,
        reply,
        total(lambda judgement: judgement.spent),
        total(lambda judgement: judgement.remembered),
        notes,
    )
