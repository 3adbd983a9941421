"""Scores by a language model that is asked for its verdict: one answer at a time, or two answers in both orders."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, groupby
from typing import Any

from uft_ds.data.example import Message
from uft_ds.errors import CheckFailed
from uft_ds.scoring.endpoint import Client, Endpoint, RequestFailed
from uft_ds.scoring.item import NO_TOKENS, Item, Judgement, Tokens, failed, found
from uft_ds.scoring.pacing import Budget, Pace
from uft_ds.scoring.questions import Template, grade_rule, preference_rule
from uft_ds.scoring.replies import Kept, Replies, request_key
from uft_ds.scoring.threads import in_threads
from uft_ds.scoring.verdict import draw_nonce, grade_in, preference_in

FORMAT_TRIES = 3
"""How often a judge is asked anew whose reply has no verdict."""
CONTRADICTION = "contradiction"
"""Counted: a comparison in which the first answer won, or the second, in both orders."""
_ANY_NONCE = "verdict_0"


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

    def __init__(
        self,
        endpoint: Endpoint,
        rubric: Rubric,
        replies: Replies,
        budget: Budget,
        *,
        requests_per_minute: float | None = None,
        concurrency: int = 8,
    ) -> None:
        self._ended = threading.Event()
        self.budget = budget
        self._client = Client(endpoint, Pace(requests_per_minute, self._ended), budget)
        self._endpoint, self._rubric, self._replies = endpoint, rubric, replies
        self._concurrency = concurrency
        self._patience = _Patience(2 * concurrency + 4, endpoint.url)
        self.batch_items = 4 * concurrency

    def identity(self) -> Mapping[str, Any]:
        template = self._rubric.template
        return {
            "scorer": f"{'pairwise judge' if template.compares else 'judge'}:{self._endpoint.body['model']}",
            "url": self._endpoint.url,
            "body": {name: value for name, value in self._endpoint.body.items() if value is not None},
            "template_sha256": hashlib.sha256(template.text.encode()).hexdigest(),
            "rule": self._rubric.rule(_ANY_NONCE),
        }

    def score(self, items: Sequence[Item]) -> list[Judgement]:
        if self._rubric.template.compares:
            return self._compared(items)
        return self._all((item, (item.response,)) for item in items)

    def close(self) -> None:
        self._ended.set()

    @property
    def repeated(self) -> int:
        """How many requests were sent again because of an error."""
        return self._client.repeated

    def plan(self, items: Sequence[Item]) -> list[tuple[str, Tokens, bool]]:
        """Each question that `score` would ask: its text, the tokens that it may take, and whether a reply is kept."""
        planned = []
        for item, answers in self._questions(items):
            try:
                text = self._question(item, answers, _ANY_NONCE)
            except ValueError as error:
                planned.append((f"(none: {error})", Tokens(), True))
                continue
            is_kept = self._replies.find(self._key(text)) is not None
            planned.append((text, self._client.estimate([{"role": "user", "content": text}]), is_kept))
        return planned

    def _questions(self, items: Sequence[Item]) -> Iterator[tuple[Item, tuple[str, ...]]]:
        if not self._rubric.template.compares:
            yield from ((item, (item.response,)) for item in items)
            return
        for a, b in _duels(items):
            yield items[a], (items[a].response, items[b].response)
            yield items[a], (items[b].response, items[a].response)

    def _compared(self, items: Sequence[Item]) -> list[Judgement]:
        """The mean share of each answer in its comparisons with the other answers of its row."""
        duels = list(_duels(items))
        verdicts = self._all(self._questions(items))
        sides: list[list[Judgement]] = [[] for _ in items]
        for number, (a, b) in enumerate(duels):
            first, second = _share_of_first(*verdicts[2 * number : 2 * number + 2])
            sides[a].append(first)
            sides[b].append(second)
        return [
            _mean(of_one) if of_one else failed("no other answer in its row to compare it with") for of_one in sides
        ]

    def _all(self, questions: Iterable[tuple[Item, tuple[str, ...]]]) -> list[Judgement]:
        # At an error, requests that are under way are waited for, because they are paid for; waits between tries end.
        asked = list(questions)
        said = [repr((item.messages, answers, item.meta)) for item, answers in asked]
        first = {text: number for number, text in reversed(list(enumerate(said)))}
        distinct = sorted(first.values())
        judged = in_threads(
            lambda number: self._asked(*asked[number]), distinct, self._concurrency, on_error=self.close
        )
        of = dict(zip(distinct, judged, strict=True))
        # A question that stands there twice is asked once, and paid for once.
        return [
            of[number] if first[text] == number else replace(of[first[text]], spent=NO_TOKENS, remembered=NO_TOKENS)
            for number, text in enumerate(said)
        ]

    def _asked(self, item: Item, answers: tuple[str, ...]) -> Judgement:
        """The verdict on one question: the kept one, or a new one."""
        try:
            key = self._key(self._question(item, answers, _ANY_NONCE))
        except ValueError as error:
            return failed(str(error))
        kept = self._replies.find(key)
        if kept is not None:
            try:
                return found(self._rubric.value_in(kept.text, kept.nonce), kept.text, remembered=kept.tokens)
            except ValueError:
                pass  # a damaged file: as if there were none
        spent, reason, reply_text = Tokens(), "", ""
        for _ in range(FORMAT_TRIES):
            texts = (*answers, *(message.content for message in item.messages), *map(str, item.meta.values()))
            nonce = draw_nonce((self._rubric.template.text, *texts))
            question = self._question(item, answers, nonce)
            try:
                reply = self._client.ask([{"role": "user", "content": question}])
            except RequestFailed as error:
                self._patience.failed(error)
                return failed(str(error), reply_text, spent=spent)
            self._patience.answered()
            spent, reply_text = spent + reply.spent, reply.text
            try:
                value = self._rubric.value_in(reply.text, nonce)
            except ValueError as error:
                reason = str(error)
                continue
            self._replies.keep(key, Kept(nonce, reply.text, reply.spent, reply.model))
            return found(value, reply.text, spent=spent)
        return failed(f"{reason} (asked {FORMAT_TRIES} times)", reply_text, spent=spent)

    def _question(self, item: Item, answers: tuple[str, ...], nonce: str) -> str:
        messages: tuple[Message, ...] = item.messages
        return self._rubric.template.filled(nonce, messages, answers, item.meta, self._rubric.rule(nonce))

    def _key(self, question: str) -> str:
        return request_key(self._endpoint.url, self._endpoint.body, question)


class _Patience:
    """Ends the run if many requests in a row could not reach the judge: it is down, and no item's fault."""

    def __init__(self, most: int, url: str) -> None:
        self._most, self._url = most, url
        self._in_a_row = 0
        self._lock = threading.Lock()

    def answered(self) -> None:
        with self._lock:
            self._in_a_row = 0

    def failed(self, error: RequestFailed) -> None:
        with self._lock:
            self._in_a_row = self._in_a_row + 1 if error.is_unreachable else 0
            if self._in_a_row >= self._most:
                raise CheckFailed(f"{self._url} cannot be reached: {error}; {self._in_a_row} items in a row")


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
