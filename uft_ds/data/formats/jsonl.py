"""Our own row format `jsonl`, and its JSON Schema."""

from __future__ import annotations

import difflib
import json
from importlib import resources
from typing import Any

from uft_ds.data.example import Message
from uft_ds.data.formats.columns import about_medium, is_medium, known_elsewhere, meaning_of, reads
from uft_ds.data.formats.fields import KnownKey, Row, UnknownKey, default_score, label_score, present, shown, text
from uft_ds.data.formats.scales import UNIT, Scale, checked_score, scored
from uft_ds.data.formats.turns import (
    Item,
    Tools,
    Turns,
    all_supervised,
    answered,
    conversation,
    pair,
    question_turns,
    tool_schemas,
)

KEYS = (
    "prompt",
    "messages",
    "tools",
    "response",
    "score",
    "label",
    "chosen",
    "rejected",
    "score_chosen",
    "score_rejected",
    "meta",
)
_OF_ONE = {"response", "score", "label"}
_OF_TWO = {"chosen", "rejected", "score_chosen", "score_rejected"}


@scored("score", "score_chosen", "score_rejected", scale=UNIT)
@reads(*KEYS)
def jsonl(row: Row, *, score: float | None, score_range: Scale = UNIT) -> list[Item]:
    """Our own format: a prompt and the response or responses to it.

        `prompt` (text) or `messages` (turns up to the response), and one of
            `response`                               instruction, the source's score or 1
            `response`, `score` from 0 to 1          score
            `response`, `label` true or false        binary
            `chosen`, `rejected`, and optionally `score_chosen`, `score_rejected` from 0 to 1     pair
        `messages` that end with an assistant turn, alone: instruction, every assistant turn supervised

    The source's `score_range` gives scores another scale than 0 to 1. With `messages`, `tools` may list JSON schemas.
    Null means absent. `meta` may hold anything and is ignored. Any other key is refused, because a misspelt `score`
    would silently become 1.
    """
    _check_keys(row)
    given = present(row)
    if ("prompt" in given) == ("messages" in given):
        found = "both" if "prompt" in given else "neither"
        raise ValueError(f"expected either 'prompt' or 'messages', found {found}")
    if "tools" in given and "prompt" in given:
        raise ValueError("'tools' goes with 'messages', not with 'prompt'")
    tools = tool_schemas(row.get("tools"))
    if "messages" in given and not given & (_OF_ONE | _OF_TWO):
        return [_conversation(row, score, tools)]
    in_turns = "messages" in given
    prompt = question_turns(row["messages"], "messages") if in_turns else (Message("user", text(row, "prompt")),)
    return [_two(row, prompt, tools, score_range) if given & _OF_TWO else _one(row, score, prompt, tools, score_range)]


def jsonl_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of one row. Its description states the rules that a schema cannot express."""
    return json.loads(resources.files("uft_ds.data.formats").joinpath("jsonl.schema.json").read_text(encoding="utf-8"))


def _conversation(row: Row, score: float | None, tools: Tools) -> Item:
    turns = conversation(row["messages"])
    if turns[-1].role != "assistant":
        raise ValueError("'messages' must end with an assistant turn, or the row hold 'response'; found neither")
    return all_supervised(turns, default_score(score), tools)


def _one(row: Row, score: float | None, prompt: Turns, tools: Tools, scale: Scale) -> Item:
    given = present(row)
    answer = Message("assistant", text(row, "response"))
    if {"score", "label"} <= given:
        raise ValueError("expected either 'score' or 'label', found both")
    if "label" in given:
        return answered(prompt, answer, label_score(row), "binary", tools)
    if "score" in given:
        return answered(prompt, answer, checked_score(row["score"], scale=scale), "score", tools)
    return answered(prompt, answer, default_score(score), "instruction", tools)


def _two(row: Row, prompt: Turns, tools: Tools, scale: Scale) -> Item:
    given = present(row)
    if given & _OF_ONE:
        raise ValueError(f"{min(given & _OF_ONE)!r} does not go with {min(given & _OF_TWO)!r}")
    chosen, rejected = (Message("assistant", text(row, side)) for side in ("chosen", "rejected"))
    scores = None
    if given & {"score_chosen", "score_rejected"}:
        better, worse = (checked_score(row.get(key), key, scale) for key in ("score_chosen", "score_rejected"))
        scores = better, worse
    return pair(prompt, chosen, rejected, scores, tools)


def _check_keys(row: Row) -> None:
    unknown = [key for key in row if key not in KEYS]
    if not unknown:
        return
    medium = next(filter(is_medium, unknown), None)
    if medium is not None:
        raise KnownKey(f"unknown key {shown(medium)}. {about_medium(medium)}")
    found = f"unknown key {shown(unknown[0])}"
    columns: dict[str, str] = {}
    for key in unknown:
        ours = known_elsewhere(key, row[key])
        if ours is not None and ours not in present(row):
            columns.setdefault(ours, key)
    near = difflib.get_close_matches(unknown[0], KEYS, n=1)
    if near and unknown[0] not in columns.values():
        raise KnownKey(f"{found}; did you mean {near[0]!r}?")
    if columns:
        raise KnownKey(f"{found}; {_renaming(columns)}")
    meaning = meaning_of(unknown[0])
    if meaning is not None:
        raise UnknownKey(f"{found}, by its name {meaning}; only what is not to be trained on goes under 'meta'")
    raise UnknownKey(f"{found}; put extra fields under 'meta'")


def _renaming(columns: dict[str, str]) -> str:
    """The `columns` to set. Whether a name like `reward` means the score, only the user knows: without it all is 1."""
    named = f"set this source's `columns: {{{', '.join(f'{ours}: {theirs}' for ours, theirs in columns.items())}}}`"
    feedback = columns.get("score", columns.get("label"))
    if feedback is None:
        return named
    return f"if {shown(feedback)} is the score, {named}; only what is not to be trained on goes under 'meta'"
