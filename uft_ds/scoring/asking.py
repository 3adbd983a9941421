"""Ask a judge: each question under a name that is drawn for it, several at once; what it has said is kept."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from uft_ds.errors import CheckFailed
from uft_ds.scoring.endpoint import Client, Endpoint, RequestFailed
from uft_ds.scoring.item import NO_TOKENS, Judgement, Tokens, failed, found
from uft_ds.scoring.pacing import Budget, Pace
from uft_ds.scoring.replies import Kept, Replies, request_key
from uft_ds.scoring.threads import in_threads
from uft_ds.scoring.verdict import draw_nonce

FORMAT_TRIES = 3
"""How often a judge is asked anew whose reply has no verdict."""
ANY_NONCE = "verdict_0"
"""In place of a drawn name, where a question's content is meant."""

Chat = list[dict[str, str]]


@dataclass(frozen=True)
class Question:
    """What a judge is asked.

    chat: from a drawn name to the messages; raises ValueError where there is no such question.
    value_in: from a reply and that name to the verdict's number; raises ValueError where there is none.
    texts: all that the messages are made of, in which the name may not be.
    """

    chat: Callable[[str], Chat]
    value_in: Callable[[str, str], float]
    texts: Sequence[str]


class Judge:
    """A judge at an endpoint. What it has said is kept, so a question that is asked again costs nothing."""

    def __init__(
        self,
        endpoint: Endpoint,
        replies: Replies,
        budget: Budget,
        *,
        requests_per_minute: float | None = None,
        concurrency: int = 8,
    ) -> None:
        self._ended = threading.Event()
        self.endpoint, self.budget, self.concurrency = endpoint, budget, concurrency
        self._client = Client(endpoint, Pace(requests_per_minute, self._ended), budget)
        self._replies = replies
        self._patience = _Patience(2 * concurrency + 4, endpoint.url)

    def close(self) -> None:
        self._ended.set()

    @property
    def repeated(self) -> int:
        """How many requests were sent again because of an error."""
        return self._client.repeated

    def plan(self, questions: Sequence[Question]) -> list[tuple[str, Tokens, bool]]:
        """Of each question: its text, the tokens that it may take, and whether a reply is kept."""
        planned = []
        for question in questions:
            try:
                chat = question.chat(ANY_NONCE)
            except ValueError as error:
                planned.append((f"(none: {error})", Tokens(), True))
                continue
            is_kept = self._replies.find(self._key(chat)) is not None
            planned.append(("\n\n".join(turn["content"] for turn in chat), self._client.estimate(chat), is_kept))
        return planned

    def ask(self, questions: Sequence[Question]) -> list[Judgement]:
        """One judgement for each question, in order. A question that stands there twice is asked and paid for once.

        Raises:
            UserError: no question can be answered, as with a wrong key. CheckFailed: it may not go on.
        """
        said = [self._said(question) for question in questions]
        first = {text: number for number, text in reversed(list(enumerate(said)))}
        distinct = sorted(first.values())
        # At an error, requests that are under way are waited for, because they are paid for; waits between tries end.
        judged = in_threads(
            lambda number: self._asked(questions[number]), distinct, self.concurrency, on_error=self.close
        )
        of = dict(zip(distinct, judged, strict=True))
        return [
            of[number] if first[text] == number else replace(of[first[text]], spent=NO_TOKENS, remembered=NO_TOKENS)
            for number, text in enumerate(said)
        ]

    def _said(self, question: Question) -> str:
        try:
            return self._key(question.chat(ANY_NONCE))
        except ValueError as error:
            return str(error)

    def _asked(self, question: Question) -> Judgement:
        """The verdict on one question: the kept one, or a new one."""
        try:
            key = self._key(question.chat(ANY_NONCE))
        except ValueError as error:
            return failed(str(error))
        kept = self._replies.find(key)
        if kept is not None:
            try:
                return found(question.value_in(kept.text, kept.nonce), kept.text, remembered=kept.tokens)
            except ValueError:
                pass  # a damaged file: as if there were none
        spent, reason, reply_text = Tokens(), "", ""
        for _ in range(FORMAT_TRIES):
            nonce = draw_nonce(question.texts)
            try:
                reply = self._client.ask(question.chat(nonce))
            except RequestFailed as error:
                self._patience.failed(error)
                return failed(str(error), reply_text, spent=spent)
            self._patience.answered()
            spent, reply_text = spent + reply.spent, reply.text
            try:
                value = question.value_in(reply.text, nonce)
            except ValueError as error:
                reason = str(error)
                continue
            self._replies.keep(key, Kept(nonce, reply.text, reply.spent, reply.model))
            return found(value, reply.text, spent=spent)
        return failed(f"{reason} (asked {FORMAT_TRIES} times)", reply_text, spent=spent)

    def _key(self, chat: Chat) -> str:
        alone = len(chat) == 1 and chat[0]["role"] == "user"
        return request_key(self.endpoint.url, self.endpoint.body, chat[0]["content"] if alone else json.dumps(chat))


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
