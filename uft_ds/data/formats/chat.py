"""Formats of public instruction data sets: conversations, and instructions with an answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from uft_ds.data.example import Message
from uft_ds.data.formats.columns import reads
from uft_ds.data.formats.fields import (
    Row,
    checked_text,
    content,
    default_score,
    from_json,
    label_score,
    optional_text,
    shown,
    text,
)
from uft_ds.data.formats.marks import check_turn_keys, extras_of, is_marked_as_context
from uft_ds.data.formats.turns import (
    Item,
    Tools,
    Turns,
    all_supervised,
    answered,
    check_prompt_is_said,
    check_turns,
    one_answer,
    pair,
    row_messages,
    row_tools,
    tool_calls,
)


@reads("messages", "prompt")
def ultrachat(row: Row, *, score: float | None) -> list[Item]:
    """HuggingFaceH4/ultrachat_200k: `messages` of alternating turns; every assistant turn is supervised.

    `prompt` may repeat one of the turns, as it does there.
    """
    turns = row_messages(row)
    check_prompt_is_said(row, turns)
    return [all_supervised(turns, default_score(score))]


@reads("instruction", "input", "output", "system", "history")
def alpaca(row: Row, *, score: float | None) -> list[Item]:
    """tatsu-lab/alpaca: `instruction`, `input` (may be absent or empty), `output`; optional `system`, `history`.

    The user's turn is the instruction and the input, joined by a newline as in LLaMA-Factory. Alpaca's own template
    ("Below is an instruction ...", "### Response:") is not used; the model's chat template takes its place. `history`
    holds earlier turns `[[question, answer], ...]`, which are context.
    """
    system = optional_text(row, "system")
    turns = [Message("system", system)] if system is not None else []
    for index, exchange in enumerate(_history(row.get("history"))):
        for role, said in zip(("user", "assistant"), exchange, strict=True):
            turns.append(Message(role, checked_text(said, f"history {index}")))  # type: ignore[arg-type]
    asked = (text(row, "instruction"), optional_text(row, "input"))
    turns.append(Message("user", "\n".join(part for part in asked if part is not None)))
    return [answered(tuple(turns), Message("assistant", text(row, "output")), default_score(score), "instruction")]


def _history(value: Any) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(e, list | tuple) and len(e) == 2 for e in value):
        raise ValueError(f"'history': expected a list of [question, answer], found {shown(value)}")
    return value


SHAREGPT_ROLES = {
    "system": "system",
    "developer": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}


@reads("conversations", "system", "tools", "chosen", "rejected", "label")
def sharegpt(row: Row, *, score: float | None) -> list[Item]:
    """ShareGPT as in LLaMA-Factory: `conversations` of turns `{from, value}`; optional `system`, `tools`.

    Every gpt turn is supervised unless it is marked as not to be learned (`weight: 0`), and so is a `function_call`,
    whose value is JSON: `{name, arguments}` or a list of them. Turns after the last supervised one are dropped. With
    `label` (true or false), only the last turn is supervised, as binary feedback. With `chosen` and `rejected` (one
    turn each), the row is a pair, and `conversations` is its prompt.
    """
    turns = _sharegpt_turns(row)
    tools = row_tools(row)
    if row.get("chosen") is not None or row.get("rejected") is not None:
        chosen, rejected = (one_answer((_sharegpt_turn(row.get(side), side),), side) for side in ("chosen", "rejected"))
        return [pair(turns, chosen, rejected, tools=tools)]
    if row.get("label") is not None:
        return [answered(turns[:-1], one_answer(turns[-1:], "conversations"), label_score(row), "binary", tools)]
    return [all_supervised(turns, default_score(score), tools)]


def _sharegpt_turns(row: Row) -> Turns:
    value = from_json(row.get("conversations"), "conversations")
    if not isinstance(value, list) or not value:
        raise ValueError(f"'conversations': expected a list of turns, found {shown(value)}")
    turns = [_sharegpt_turn(turn, f"conversations, turn {index}") for index, turn in enumerate(value)]
    system = optional_text(row, "system")
    if system is not None:
        turns.insert(0, Message("system", system))
    check_turns(turns)
    return tuple(turns)


def _sharegpt_turn(turn: Any, name: str) -> Message:
    speaker = turn.get("from") if isinstance(turn, Mapping) else None
    if not isinstance(speaker, str) or speaker not in SHAREGPT_ROLES:
        raise ValueError(f"{name!r}: expected 'from' to be one of {', '.join(SHAREGPT_ROLES)}, found {shown(speaker)}")
    role: Any = SHAREGPT_ROLES[speaker]
    is_call = speaker == "function_call"
    try:
        check_turn_keys(turn)
        if turn.get("tool_calls"):
            raise ValueError("'tool_calls' is not read in this layout; give a call as a turn from 'function_call'")
        return Message(
            role,
            "" if is_call else content(turn.get("value"), "value"),
            tool_calls=_function_call(turn.get("value")) if is_call else (),
            extras=extras_of(turn),
            marked_as_context=is_marked_as_context(turn, role),
        )
    except ValueError as error:
        raise ValueError(f"{name!r}: {error}") from None


def _function_call(value: Any) -> Tools:
    calls = from_json(value, "value")
    return tool_calls(calls if isinstance(calls, list) else [calls])
