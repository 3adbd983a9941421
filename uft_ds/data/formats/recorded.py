"""The format `recorded`: answers that an online run has generated, scored and recorded, by their exact tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from uft_ds.data.example import Exact, Example, Message
from uft_ds.data.formats.columns import reads
from uft_ds.data.formats.fields import LeftOut, Row, checked_text, shown, text
from uft_ds.data.formats.scales import UNIT, checked_score
from uft_ds.data.formats.turns import Item, question_turns


@reads("source", "unit", "origin", "prompt_ids", "messages", "answers", "left_out", "tokenizer")
def recorded(row: Row, *, score: float | None) -> list[Item]:
    """The record of an online run, `RUN/rollouts/answers`: a prompt and its scored answers in each row.

    The answers are trained on by the tokens that the policy has sampled, which are not always those that its text would
    be tokenised to. So the base's tokenizer must be that of the run. A prompt that the run has left out is left out.
    """
    answers = row.get("answers")
    if not isinstance(answers, list):
        raise ValueError(f"'answers': expected a list, found {shown(answers)}; this is not the record of an online run")
    if row.get("left_out"):
        raise LeftOut("left out by the run that recorded it", len(answers))
    prompt, tokenizer = question_turns(row.get("messages"), "messages"), text(row, "tokenizer")
    prompt_ids = _ids(row.get("prompt_ids"), "prompt_ids")
    return [
        _answer(answer, f"answers[{n}]", prompt, Exact(prompt_ids, (), tokenizer)) for n, answer in enumerate(answers)
    ]


def _answer(answer: Any, name: str, prompt: tuple[Message, ...], exact: Exact) -> Item:
    if not isinstance(answer, dict):
        raise ValueError(f"{name!r}: expected an object, found {shown(answer)}")
    said = checked_text(answer.get("text"), f"{name}.text", may_be_empty=True)
    turn = Message("assistant", said, checked_score(answer.get("score"), f"{name}.score", UNIT))
    return Example((*prompt, turn), "score", exact=replace(exact, answer_ids=_ids(answer.get("ids"), f"{name}.ids")))


def _ids(value: Any, name: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{name!r}: expected a list of token ids, found {shown(value)}")
    for token in value:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < 2**31:
            raise ValueError(f"{name!r}: found {shown(token)}, expected a token id")
    return tuple(value)
