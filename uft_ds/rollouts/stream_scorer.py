"""Scores by a reward model that is an adapter on the policy's own base: one more stream of the engine, on all ranks.

    questions and answers -> sequences of their very tokens -> packed, prompts shared -> one visit of the weights
    -> the head's value at each answer's last token -> every rank has them all; rank 0 maps and records them

No second model is in memory and none is gathered: under ZeRO-3 the pass gathers the base once, as a forward of the
policy does.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np

from uft_ds.data.example import Response, Sequence
from uft_ds.data.mixture import Step
from uft_ds.engine.engine import Engine
from uft_ds.rollouts.answers import Answer, Answers, Question, Unanswered
from uft_ds.rollouts.scoring import Truncated, left_out_before_scoring
from uft_ds.streams.stream import SCORING


@dataclass(frozen=True)
class StreamScorer:
    """Every rank has one and calls it alike.

    engine: with the stream `SCORING`. sources: the numbers of those whose answers it scores.
    truncated: decides which prompts are left out, and so need no values.
    """

    engine: Engine
    tokens_per_micro_batch: int
    sources: frozenset[int]
    truncated: Truncated

    def rewards(self, asked: Seq[int], questions: Seq[Question], answers: Seq[Answers]) -> dict[int, tuple[float, ...]]:
        """By a prompt's place in the step, the reward of each of its answers; not of prompts of other sources.

        A reward is read at an answer's last token, as it was in training. Of an answer that has ended that is the token
        which ended it; of one that was cut, the last one that was sampled, where no reward was trained.

        Args:
            asked: of each question, the number of its source.
            questions, answers: of the whole step, the same on every rank.
        """
        given: dict[int, tuple[Answer, ...]] = {
            place: of
            for place, (source, of) in enumerate(zip(asked, answers, strict=True))
            if source in self.sources
            and not isinstance(of, Unanswered)
            and not left_out_before_scoring(of, self.truncated)
        }
        prompts = [(questions[place].token_ids, answer.token_ids) for place, of in given.items() for answer in of]
        values = iter(values_of(self.engine, prompts, self.tokens_per_micro_batch))
        return {place: tuple(next(values) for _ in of) for place, of in given.items()}


def values_of(
    engine: Engine, conversations: Seq[tuple[Seq[int], Seq[int]]], tokens_per_micro_batch: int
) -> list[float]:
    """The reward of each (prompt, answer), given by their tokens, in order. Every rank must call it, with the same.

    A value does not depend on what it is packed with, up to the rounding of matmuls of other shapes.
    """
    if not conversations:
        return []
    # `origin` is the answer's number: it comes back with the response, wherever that is packed.
    step = Step(0, tuple(sequence_of(*tokens, str(number)) for number, tokens in enumerate(conversations)))
    own: list[tuple[int, float]] = []
    with engine.evaluating():
        for batch in engine.micro_batches(step, tokens_per_micro_batch):
            values_R = engine(batch, [SCORING])[SCORING.name].values_R
            assert values_R is not None
            own += zip((int(response.origin) for response in batch.responses), values_R.tolist(), strict=True)
    found = dict(pair for of_rank in engine.gather_over_data(own) for pair in of_rank)
    return [found[number] for number in range(len(conversations))]


def sequence_of(prompt_ids: Seq[int], answer_ids: Seq[int], name: str) -> Sequence:
    """An answer to a prompt, given by their tokens, whose reward is wanted. name: by which it is found again."""
    ids = np.array([*prompt_ids, *answer_ids], dtype=np.int32)
    return Sequence(ids, (Response(len(prompt_ids), len(ids), 0.0, "score", name),))
