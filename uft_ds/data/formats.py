"""Source formats: each turns one row of a data set into an `Example`.

A format is a function `(row, *, score, origin) -> Example`; FORMATS maps its name to it. It raises ValueError
with what was found and what was expected; the caller adds the file and line.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from typing import Any

from uft_ds.data.example import Example, Kind, Message, Role

Row = Mapping[str, Any]
Format = Callable[..., Example]

JSONL_KEYS = ("prompt", "messages", "response", "score", "meta")


def jsonl(row: Row, *, score: float | None, origin: str) -> Example:
    """Our own format: `prompt` (text) or `messages` (turns up to the response), `response`, optional `score`.

    A row with a score is of kind `score`; one without is instruction data with the source's score, or 1.
    `meta` may hold anything and is ignored; any other key is refused, for a misspelt `score` would silently
    become 1.
    """
    for key in row:
        if key not in JSONL_KEYS:
            near = difflib.get_close_matches(key, JSONL_KEYS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "put extra fields under 'meta'"
            raise ValueError(f"unknown key {key!r}; {hint}")
    has_prompt, has_messages = row.get("prompt") is not None, row.get("messages") is not None
    if has_prompt == has_messages:
        raise ValueError("expected either 'prompt' or 'messages', found " + ("both" if has_prompt else "neither"))
    prompt = (Message("user", text(row, "prompt")),) if has_prompt else conversation(row["messages"])
    if not prompt or prompt[-1].role != "user":
        raise ValueError("'messages' must end with the user's turn that 'response' answers")
    kind: Kind = "instruction" if row.get("score") is None else "score"
    value = default_score(score) if kind == "instruction" else checked_score(row["score"])
    return Example((*prompt, Message("assistant", text(row, "response"), value)), kind, origin)


def ultrachat(row: Row, *, score: float | None, origin: str) -> Example:
    """HuggingFaceH4/ultrachat_200k: `messages` of alternating turns; every assistant turn is supervised."""
    messages = conversation(row.get("messages"))
    while messages and messages[-1].role != "assistant":
        messages = messages[:-1]  # nobody answered the last question
    if not messages:
        raise ValueError("'messages' holds no assistant turn")
    value = default_score(score)
    supervised = tuple(Message(m.role, m.content, value) if m.role == "assistant" else m for m in messages)
    return Example(supervised, "instruction", origin)


# In twentieths, for the sum is then exact: in floats, all 4 would give 1.0000000000000002.
HELPSTEER2_WEIGHTS = {"helpfulness": 13, "correctness": 16, "coherence": 9}
_HELPSTEER2_TURN = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")


def helpsteer2(row: Row, *, score: float | None, origin: str) -> Example:
    """nvidia/HelpSteer2: score = (0.65 helpfulness + 0.8 correctness + 0.45 coherence) / 7.6.

    The attributes are 0 to 4, so the score is in [0, 1] (UNA, arXiv 2408.15339 section 4). About 29% of the
    prompts hold a whole conversation, its turns marked by `<extra_id_1>`.
    """
    total = 0
    for name, weight in HELPSTEER2_WEIGHTS.items():
        value = row.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 4:
            raise ValueError(f"{name!r}: found {value!r}, expected an integer from 0 to 4")
        total += weight * value
    first, *rest = _HELPSTEER2_TURN.split(text(row, "prompt"))
    turns = [Message("user", first)]
    for role, content in zip(rest[::2], rest[1::2], strict=True):
        turns.append(Message("user" if role == "User" else "assistant", content))
    turns.append(Message("assistant", text(row, "response"), total / (20 * 7.6)))
    _check_turns(turns)
    return Example(tuple(turns), "score", origin)


FORMATS: dict[str, Format] = {"jsonl": jsonl, "ultrachat": ultrachat, "helpsteer2": helpsteer2}


def text(row: Row, key: str) -> str:
    """A field that must hold text with something in it."""
    value = row.get(key)
    if not isinstance(value, str):
        raise ValueError(f"{key!r}: expected text, found {'nothing' if value is None else repr(value)[:40]}")
    if not value.strip():
        raise ValueError(f"{key!r} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{key!r}: holds half of a surrogate pair, which no encoding can store") from None
    return value


def conversation(value: Any) -> tuple[Message, ...]:
    """Turns `[{role, content}, ...]`: an optional system turn, then user and assistant in alternation."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"'messages': expected a list of turns, found {repr(value)[:40]}")
    turns = []
    for index, turn in enumerate(value):
        if not isinstance(turn, Mapping) or turn.get("role") not in ("system", "user", "assistant"):
            raise ValueError(f"'messages', turn {index}: expected a role of system, user or assistant")
        try:
            role: Role = turn["role"]
            turns.append(Message(role, text(turn, "content")))
        except ValueError as error:
            raise ValueError(f"'messages', turn {index}: {error}") from None
    _check_turns(turns)
    return tuple(turns)


def checked_score(value: Any) -> float:
    """A score given in the data."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"'score': found {value!r}, expected a number from 0 to 1")
    if not 0 <= value <= 1:  # NaN is not either
        raise ValueError(f"'score': found {value}, expected a finite number from 0 to 1")
    return float(value)


def default_score(score: float | None) -> float:
    """The score of instruction data: the source's, or 1 (UFT Eq. 7)."""
    return 1.0 if score is None else score


def _check_turns(turns: list[Message]) -> None:
    spoken = [m.role for m in turns if m.role != "system"]
    expected = ["user", "assistant"] * len(spoken)
    if spoken != expected[: len(spoken)] or any(m.role == "system" for m in turns[1:]):
        raise ValueError("turns must alternate user, assistant, after at most one system turn at the start")
    for turn in turns:
        if not turn.content.strip():
            raise ValueError(f"an empty {turn.role} turn")
