"""Formats of public feedback data sets: scores, binary labels and pairs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from uft_ds.data.example import Message
from uft_ds.data.formats.columns import reads
from uft_ds.data.formats.fields import LeftOut, Row, label_score, shown, text
from uft_ds.data.formats.scales import Scale, checked_score, scored
from uft_ds.data.formats.turns import (
    Item,
    Turns,
    answer_turns,
    answered,
    check_prompt_is_said,
    check_turns,
    dialogue_pair,
    one_answer,
    pair,
    prompt_turns,
    row_messages,
    row_tools,
)

# In twentieths, so that the sum is exact: with float weights, ratings that are all 4 give 1.0000000000000002.
HELPSTEER2_WEIGHTS = {"helpfulness": 13, "correctness": 16, "coherence": 9}
_HELPSTEER2_TURN = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")


@reads("prompt", "response", "helpfulness", "correctness", "coherence")
def helpsteer2(row: Row, *, score: float | None) -> list[Item]:
    """nvidia/HelpSteer2: score = (0.65 helpfulness + 0.8 correctness + 0.45 coherence) / 7.6.

    The attributes are from 0 to 4, so the score is in [0, 1] (UNA, arXiv 2408.15339 section 4). About 29% of the
    prompts hold a whole conversation, whose turns are marked by `<extra_id_1>`.
    """
    total = sum(weight * _integer(row, name, 0, 4) for name, weight in HELPSTEER2_WEIGHTS.items())
    answer = Message("assistant", text(row, "response"))
    return [answered(_helpsteer2_prompt(row), answer, total / (20 * 7.6), "score")]


@reads("prompt", "response_1", "response_2", "preference_strength")
def helpsteer2_preference(row: Row, *, score: float | None) -> list[Item]:
    """nvidia/HelpSteer2, folder `preference`: two responses and `preference_strength` from -3 to 3.

    A negative strength prefers the first response. Its size is not used: a pair only says which response is better. The
    hub's one split holds train and validation rows; their column `split` says which.
    """
    strength = _integer(row, "preference_strength", -3, 3)
    first, second = (Message("assistant", text(row, key)) for key in ("response_1", "response_2"))
    item = pair(_helpsteer2_prompt(row), *((first, second) if strength < 0 else (second, first)))
    if strength == 0:
        raise LeftOut("tie", 2)
    return [item]


def _helpsteer2_prompt(row: Row) -> Turns:
    first, *rest = _HELPSTEER2_TURN.split(text(row, "prompt"))
    turns = [Message("user", first)]
    for role, said in zip(rest[::2], rest[1::2], strict=True):
        turns.append(Message("user" if role == "User" else "assistant", said))
    return tuple(turns)


def _integer(row: Row, name: str, low: int, high: int) -> int:
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name!r}: found {shown(value)}, expected an integer from {low} to {high}")
    return value


_FROM_1_TO_10: Scale = (1.0, 10.0)
_FROM_1_TO_5: Scale = (1.0, 5.0)


@scored("completions[].overall_score", scale=_FROM_1_TO_10)
@reads("instruction", "completions")
def ultrafeedback(row: Row, *, score: float | None, score_range: Scale = _FROM_1_TO_10) -> list[Item]:
    """openbmb/UltraFeedback: one example per completion of an instruction, score = (overall_score - 1) / 9.

    The source's `score_range` gives another scale than 1 to 10.

    The system prompts under which the completions were written (`custom_system_prompt`) are not used, as in the
    binarized versions. Use a revision after December 2023: before it, 2,628 completions that deserved a 1 had a 10.
    """
    prompt = (Message("user", text(row, "instruction")),)
    completions = row.get("completions")
    if not isinstance(completions, list):
        raise ValueError(f"'completions': expected a list, found {shown(completions)}")
    if not completions:
        raise LeftOut("no completions", 0)
    return [_completion(prompt, completion, index, score_range) for index, completion in enumerate(completions)]


def _completion(prompt: Turns, completion: Any, index: int, scale: Scale) -> Item:
    if not isinstance(completion, Mapping):
        raise ValueError(f"'completions', number {index}: expected an object, found {shown(completion)}")
    try:
        answer = Message("assistant", text(completion, "response"))
        rating = checked_score(completion.get("overall_score"), "overall_score", scale)
        return answered(prompt, answer, rating, "score")
    except ValueError as error:
        raise ValueError(f"'completions', number {index}: {error}") from None


@scored("chosen-rating", "rejected-rating", scale=_FROM_1_TO_5)
@scored("score_chosen", "score_rejected", scale=_FROM_1_TO_10)
@scored("metadata.score_chosen", "metadata.score_rejected", scale=_FROM_1_TO_10)
@reads("prompt", "chosen", "rejected", "score_chosen", "score_rejected", "metadata", "chosen-rating", "rejected-rating")
def ultrafeedback_binarized(row: Row, *, score: float | None, score_range: Scale | None = None) -> list[Item]:
    """UltraFeedback as scored pairs: `prompt`, `chosen`, `rejected`. Each side is text, or turns with the prompt.

    In HuggingFaceH4/ultrafeedback_binarized the scores are `score_chosen` and `score_rejected` from 1 to 10 (also
    inside `metadata`), mapped by (s - 1) / 9; about a tenth of its pairs are ties. In
    argilla/ultrafeedback-binarized-preferences-cleaned they are `chosen-rating` and `rejected-rating`, means of
    ratings from 1 to 5, mapped by (s - 1) / 4. The source's `score_range` gives another scale.
    """
    scores = _binarized_scores(row, score_range)
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if isinstance(chosen, list) and isinstance(rejected, list):
        return [dialogue_pair(_binarized_turns(row, "chosen"), _binarized_turns(row, "rejected"), scores)]
    better, worse = (Message("assistant", text(row, side)) for side in ("chosen", "rejected"))
    return [pair((Message("user", text(row, "prompt")),), better, worse, scores)]


def _binarized_turns(row: Row, side: str) -> Turns:
    """One side as a whole conversation: its own turns, or `prompt` followed by the answer."""
    answer = answer_turns(row[side], side)
    turns = answer if answer[0].role != "assistant" else (*prompt_turns(row.get("prompt"), "prompt"), *answer)
    check_turns(turns)
    return turns


def _binarized_scores(row: Row, score_range: Scale | None) -> tuple[float, float]:
    fields, names, scale = row, ("score_chosen", "score_rejected"), _FROM_1_TO_10
    if row.get("chosen-rating") is not None:
        names, scale = ("chosen-rating", "rejected-rating"), _FROM_1_TO_5
    elif row.get("score_chosen") is None and isinstance(row.get("metadata"), Mapping):
        fields = row["metadata"]
    better, worse = (checked_score(fields.get(name), name, score_range or scale) for name in names)
    return better, worse


_HH_TURN = re.compile(r"\n\n(Human|Assistant):")


@reads("chosen", "rejected")
def hh_rlhf(row: Row, *, score: float | None) -> list[Item]:
    """Anthropic/hh-rlhf: `chosen` and `rejected` are dialogues `\\n\\nHuman: ...\\n\\nAssistant: ...`.

    White space around a turn is removed. The two dialogues may differ only in their last turn. A few rows of the real
    data differ earlier, end with an empty turn or have one speaker twice in a row; they are refused.
    """
    return [dialogue_pair(_hh_turns(row, "chosen"), _hh_turns(row, "rejected"))]


def _hh_turns(row: Row, side: str) -> Turns:
    before, *rest = _HH_TURN.split(text(row, side))
    if before.strip() or not rest:
        raise ValueError(f"{side!r}: expected '\\n\\nHuman: ' at the start, found {shown(row[side])}")
    turns = tuple(
        Message("user" if speaker == "Human" else "assistant", said.strip())
        for speaker, said in zip(rest[::2], rest[1::2], strict=True)
    )
    try:
        check_turns(turns)
    except ValueError as error:
        raise ValueError(f"{side!r}: {error}") from None
    return turns


@reads("prompt", "completion", "label", "messages", "tools")
def kto(row: Row, *, score: float | None) -> list[Item]:
    """Binary feedback: `prompt` and `completion`, each text or turns, and `label` true or false.

    LLaMA-Factory's `messages` and `label` are accepted too; the last turn is then the completion.
    """
    value = label_score(row)
    tools = row_tools(row)
    if row.get("messages") is not None:
        if row.get("completion") is not None:
            raise ValueError("expected 'completion' or 'messages', found both")
        turns = row_messages(row)
        check_prompt_is_said(row, turns)
        return [answered(turns[:-1], one_answer(turns[-1:], "messages"), value, "binary", tools)]
    completion = one_answer(answer_turns(row.get("completion"), "completion"), "completion")
    return [answered(prompt_turns(row.get("prompt"), "prompt"), completion, value, "binary", tools)]
