"""The values that pass between a source of rollouts and a generator.

Question (a prompt, asked n times) -> generator -> n Answers, or the reason why there are none
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor

_SEEDS = 2**31
"""Seeds of single answers are below this: servers take signed 32-bit ones."""


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    temperature: above 0; logits are divided by it. top_p: the share of probability from which a token is drawn; 1: all.
    stop_token_ids: tokens that end an answer, in no particular order.
    """

    temperature: float
    top_p: float
    max_new_tokens: int
    stop_token_ids: tuple[int, ...]

    @property
    def is_of_policy(self) -> bool:
        """Whether answers are drawn from the policy itself, not from a distribution that is sharper or cut."""
        return self.temperature == 1.0 and self.top_p == 1.0


@dataclass(frozen=True)
class Question:
    """A prompt, and how often it is asked.

    token_ids: the prompt's, up to where the answer begins.
    seed: of the first answer; not negative. The seeds of all are `seeds`.
    """

    token_ids: tuple[int, ...]
    answers: int
    seed: int

    @property
    def seeds(self) -> tuple[int, ...]:
        """A seed for each answer. They differ from each other, also from those of questions with neighbouring seeds."""
        return tuple(int(seed) for seed in np.random.default_rng(self.seed).integers(_SEEDS, size=self.answers))


@dataclass(frozen=True)
class Answer:
    """One answer as the generator sampled it: it is trained on by these tokens and never tokenised again.

    token_ids: at least one; with the stop token at the end if there is one.
    ended: whether it ends in a stop token; if not, it was cut at `max_new_tokens`.
    logps: [tokens], nats, at temperature 1 and without top_p, by the generator; None if it does not say.
    """

    token_ids: tuple[int, ...]
    ended: bool
    logps: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Unanswered:
    """Why a question has no answers, or fewer than were asked for: then none of them is used."""

    reason: str


Answers = tuple[Answer, ...] | Unanswered


@dataclass(frozen=True)
class PolicyVersion:
    """The policy after a step, by its content.

    step: number of optimiser steps before it. digest: SHA-256 of the adapter's tensors, hex.
    """

    step: int
    digest: str


class Generator(Protocol):
    """Answers questions by the policy.

    on_all_ranks: whether every rank must call `answer`, with the same questions; if not, rank 0 alone calls it.
    needs_adapter: whether `publish` must be called, on rank 0, before the first question to each version.
    """

    on_all_ranks: bool
    needs_adapter: bool

    def identity(self) -> Mapping[str, Any]:
        """What answers depend on besides policy, questions and seeds, as plain JSON values."""

    def publish(self, version: PolicyVersion, tensors: Mapping[str, Tensor]) -> None:
        """Hand over the policy; all later questions are answered by it.

        Args:
            tensors: the whole adapter by PEFT's names, on the host.
        Raises:
            GeneratorLost: the generator cannot be reached, or does not take the adapter. CheckFailed: it answers by
                another policy.
        """

    def answer(self, questions: list[Question]) -> list[Answers]:
        """The answers to each question, in order; on every rank if `on_all_ranks`.

        Raises:
            GeneratorLost: the generator cannot be reached any more, after all tries. Stopped: the run is to stop.
        """

    def close(self) -> None:
        """End what it has started."""
