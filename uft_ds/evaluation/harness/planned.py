"""The model as lm-evaluation-harness sees it: it answers from the record, and asks for what is not in it.

Each rank calls the harness's `evaluate` with equal requests and answers its share of the batches. Rank 0 goes on with
the answers of all ranks; the others end when they have answered what they can be asked.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, Protocol

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from uft_ds.errors import CheckFailed
from uft_ds.evaluation.harness.answered import Answers, key_of

KIND_OF = {"multiple_choice": "loglikelihood"}
"""The kind of a task's requests, where it does not have the name of the task's output type."""
OnAnswered = Callable[[str, int, int], None]
"""Called with the kind of requests, how many of them are answered, and their number."""


class Backend(Protocol):
    """Answers requests.

    harness: the harness's own model, for its chat template. cut_prompts: questions whose prompt lost its beginning, by
    task; one with four choices counts once.
    batches: places that are answered together. answer: of the places of one batch.
    """

    harness: Any

    @property
    def cut_prompts(self) -> Counter[str]: ...

    def batches(self, kind: str, requests: Seq[Instance]) -> list[list[int]]: ...

    def answer(self, kind: str, requests: Seq[Instance], places: Seq[int]) -> list[Any]: ...


@dataclass(frozen=True)
class Place:
    """A process among those that answer together.

    is_lost: why another process will answer nothing more; None while all may.
    """

    rank: int = 0
    size: int = 1
    is_lost: Callable[[], str | None] = lambda: None


class ShareAnswered(Exception):
    """A rank other than the first has answered its share of all requests."""


class Planned(LM):
    """The harness's interface to a model: three kinds of requests, and the chat template."""

    def __init__(
        self, backend: Backend, answers: Answers, place: Place, kinds: Iterable[str], on_answered: OnAnswered
    ) -> None:
        """
        Args:
            kinds: of requests that the tasks will make.
        """
        super().__init__()
        self._backend, self._answers, self._place, self._on_answered = backend, answers, place, on_answered
        self._left = {KIND_OF.get(kind, kind) for kind in kinds}

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        return [(float(logp), bool(greedy)) for logp, greedy in self._answered("loglikelihood", requests)]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        return [float(logp) for logp in self._answered("loglikelihood_rolling", requests)]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        return [str(text) for text in self._answered("generate_until", requests)]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return str(self._backend.harness.apply_chat_template(chat_history, add_generation_prompt))

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        found: str | None = self._backend.harness.chat_template(chat_template)
        return found

    @property
    def tokenizer_name(self) -> str:
        return str(self._backend.harness.tokenizer_name)

    def _answered(self, kind: str, requests: list[Instance]) -> list[Any]:
        batches = self._backend.batches(kind, requests)
        keys = [key_of(kind, [list(requests[place].args) for place in batch]) for batch in batches]
        sizes = dict(zip(keys, map(len, batches), strict=True))
        known = [key for key in sizes if self._answers.get(key) is not None]
        done = sum(sizes[key] for key in known)
        self._on_answered(kind, done, len(requests))
        for number, (key, batch) in enumerate(zip(keys, batches, strict=True)):
            if number % self._place.size == self._place.rank and self._answers.get(key) is None:
                self._answers.add(key, _checked(self._backend.answer(kind, requests, batch), requests[batch[0]]))
                done += len(batch)
                self._on_answered(kind, done, len(requests))
        if self._place.rank != 0:
            self._left.discard(kind)
            if not self._left:
                raise ShareAnswered
            return [_NOT_ASKED[kind]] * len(requests)
        self._answers.wait_for(
            keys,
            self._place.is_lost,
            lambda count: self._on_answered(kind, sum(sizes[key] for key in count), len(requests)),
        )
        found: dict[int, Any] = {}
        for key, batch in zip(keys, batches, strict=True):
            found |= dict(zip(batch, self._answers.get(key) or [], strict=True))
        return [found[place] for place in range(len(requests))]


_NOT_ASKED: dict[str, Any] = {"loglikelihood": (0.0, False), "loglikelihood_rolling": 0.0, "generate_until": ""}
"""Stands on other ranks than the first for what they need not know; they end before anything is made of it."""


def _checked(answers: list[Any], first: Instance) -> list[Any]:
    """The answers, as JSON can hold them.

    Raises:
        CheckFailed: a log-prob is no finite number.
    """
    found = [list(answer) if isinstance(answer, tuple) else answer for answer in answers]
    for answer in found:
        logp = answer[0] if isinstance(answer, list) else answer
        if isinstance(logp, float) and not math.isfinite(logp):
            raise CheckFailed(
                f"{first.task_name}: a log-prob is {logp}: the model's numbers overflow; evaluate it in --dtype float32"
            )
    return found
