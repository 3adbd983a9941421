"""Answer a benchmark's questions, batch by batch, each turn after the answer to the one before.

Which questions are answered together follows from the questions alone, not from what has been answered before: so an
interrupted generation goes on to the very answers that it would have had.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from uft_ds.architectures.facts import most_positions
from uft_ds.errors import CheckFailed, UserError
from uft_ds.evaluation.benchmarks.question import Answer, Question
from uft_ds.evaluation.cache import cache_is_exact
from uft_ds.evaluation.decoding import Decoding, Row, continue_at_once, continue_in_pieces, draw_of
from uft_ds.evaluation.generate import (
    Messages,
    check_length,
    decode,
    generating,
    generation_config,
    prompt_ids,
    stop_token_ids,
)
from uft_ds.evaluation.models import Subject


@dataclass(frozen=True)
class Plan:
    """How answers are made.

    temperature_of: from a question to its temperature; 0 takes the likeliest token, above it a token is drawn from the
    whole distribution. seed: of all draws, from which each answer's own seed follows.
    """

    temperature_of: Callable[[Question], float]
    max_new_tokens: int
    seed: int = 0
    batch_size: int = 16


Batch = tuple[float, list[Question]]


def batches_of(subject: Subject, questions: Sequence[Question], plan: Plan) -> list[Batch]:
    """Questions that are answered together: of one temperature, the longest first, so that a lack of memory shows.

    Raises:
        UserError: a question, with answers of the greatest length, leaves too few positions.
    """
    lengths = {}
    for question in questions:
        # Earlier answers stand in the prompt of the last turn, and each may have the greatest length.
        messages = _messages(question, len(question.turns) - 1, [""] * (len(question.turns) - 1))
        ids = prompt_ids(subject.chat.tokenizer, messages)
        check_length(subject.model, ids, 0, name=question.place)
        most, turns = most_positions(subject.model.config), len(question.turns)
        if most is not None and len(ids) + turns * plan.max_new_tokens > most:
            raise UserError(
                f"{question.place}: this question has {len(ids)} tokens, and its answers may have {turns} x "
                f"{plan.max_new_tokens}: more than the {most} positions of the model; lower --max-new-tokens to "
                f"{max(0, most - len(ids)) // turns}"
            )
        lengths[question.key] = len(ids)
    batches = []
    for temperature in sorted({plan.temperature_of(question) for question in questions}):
        of_it = [question for question in questions if plan.temperature_of(question) == temperature]
        of_it.sort(key=lambda question: lengths[question.key], reverse=True)
        for start in range(0, len(of_it), plan.batch_size):
            batches.append((temperature, of_it[start : start + plan.batch_size]))
    return batches


def answered(
    subject: Subject, batches: Sequence[Batch], plan: Plan, *, done: Collection[int] = ()
) -> Iterator[list[Answer]]:
    """The answers of each batch.

    Args:
        done: keys of questions that have been answered; a batch of such alone is passed over.
    Raises:
        CheckFailed: logits are not finite.
    """
    left = [batch for batch in batches if not all(question.key in done for question in batch[1])]
    if not left:
        return
    model, tokenizer = subject.model, subject.chat.tokenizer
    stop_ids = stop_token_ids(model, tokenizer)
    pad_id = stop_ids[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    config = generation_config(stop_ids, pad_id, max_new_tokens=plan.max_new_tokens, temperature=0.0)
    first = prompt_ids(tokenizer, _messages(batches[0][1][0], 0, []))
    with generating(model, config):
        in_pieces = cache_is_exact(model, first, model.device)
        for temperature, questions in left:
            how = Decoding(plan.max_new_tokens, tuple(stop_ids), pad_id, temperature)
            yield _batch_answered(subject, questions, how, plan.seed, in_pieces=in_pieces)


def _batch_answered(
    subject: Subject, questions: Sequence[Question], how: Decoding, seed: int, *, in_pieces: bool
) -> list[Answer]:
    model, tokenizer = subject.model, subject.chat.tokenizer
    found: list[list[tuple[str, int, bool]]] = [[] for _ in questions]
    for turn in range(len(questions[0].turns)):
        rows = []
        for question, before in zip(questions, found, strict=True):
            ids = prompt_ids(tokenizer, _messages(question, turn, [text for text, _, _ in before]))
            check_length(model, ids, how.max_new_tokens, name=f"{question.place}: turn {turn + 1}")
            rows.append(Row(tuple(ids), seed_of(seed, question.key, turn)))
        for of_one, ids in zip(found, _continued(model, rows, how, in_pieces=in_pieces), strict=True):
            is_ended = bool(ids) and ids[-1] in how.stop_ids
            said = ids[:-1] if is_ended else ids
            of_one.append((decode(tokenizer, said).strip(), len(said), is_ended))
    return [
        Answer(question.key, *(tuple(values) for values in zip(*of_one, strict=True)))
        for question, of_one in zip(questions, found, strict=True)
    ]


def _continued(model: Any, rows: Sequence[Row], how: Decoding, *, in_pieces: bool) -> list[list[int]]:
    device: torch.device = model.device
    draw = draw_of(rows, how, device)
    if in_pieces:
        ids = continue_in_pieces(model, rows, how, draw, device=device, prompts_first=False)
    else:
        ids = continue_at_once(model, rows, how, draw, device=device)
    if not draw.is_finite:
        raise CheckFailed("the model's logits are not finite while it answers, so its tokens mean nothing")
    return ids


def _messages(question: Question, turn: int, answers: Sequence[str]) -> Messages:
    """The conversation up to a turn of the user."""
    messages = []
    for asked, said in zip(question.turns, answers, strict=False):
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    return [*messages, {"role": "user", "content": question.turns[turn]}]


def seed_of(seed: int, key: int, turn: int) -> int:
    """Of one answer's draws: from the question, so that it does not depend on what else is asked."""
    digest = hashlib.sha256(f"{seed}/{key}/{turn}".encode()).digest()
    return int.from_bytes(digest[:8]) >> 1
