"""The keys of a turn beside role and text: thoughts, marks that it is not to be learned, and keys without a reader."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from uft_ds.data.formats.fields import is_empty, shown, text

THOUGHTS = ("reasoning_content", "thinking", "reasoning")
"""Names of one thing, the first is ours; transformers' templates read the others as copies of it."""

_LEARNED = ("loss", "train", "trainable", "training", "loss_mask", "loss_weight", "loss_scale", "weight")
NOT_LEARNED = ("masked",)
LEARNING = (*_LEARNED, *NOT_LEARNED)
"""Keys by which other programs say whether a turn is learned; `masked` (torchtune) says the opposite of the others."""

_EXTRAS = ("name", "tool_call_id")
TURN_KEYS = frozenset({"role", "content", "from", "value", "tool_calls", *THOUGHTS, *LEARNING, *_EXTRAS})
"""The keys of a turn that are read."""

MEDIA = ("image", "images", "video", "videos", "audio", "audios")
_UNREAD = {
    **dict.fromkeys(MEDIA, "only text is supported"),
    "function_call": "give it as 'tool_calls'",
    "function_calls": "give them as 'tool_calls'",
    "functions": "give them as the row's 'tools'",
    "tools": "give them as the row's 'tools'",
    "documents": "write them into the turn's text",
    "train_detail": "a turn is learned as a whole; leave the key out, or divide the row",
}


def check_turn_keys(turn: Mapping[str, Any]) -> None:
    """Refuse a turn that holds more than its text, in a key that is known to carry meaning and has no reader.

    Raises:
        ValueError: names the key, and what to do.
    """
    for key, remedy in _UNREAD.items():
        if not is_empty(turn.get(key)):
            raise ValueError(f"{key!r} in a turn is not read; {remedy}")


def extras_of(turn: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """What a chat template may read beside the text, by name: reasoning_content, name, tool_call_id.

    Raises:
        ValueError: two of the names for thoughts hold different ones.
    """
    thoughts = {key: text(turn, key) for key in THOUGHTS if turn.get(key) not in (None, "")}
    if len(set(thoughts.values())) > 1:
        raise ValueError(f"{' and '.join(map(repr, thoughts))} differ, but a turn has one thought; keep one of them")
    extras = [(THOUGHTS[0], next(iter(thoughts.values())))] if thoughts else []
    return (*extras, *((key, text(turn, key)) for key in _EXTRAS if turn.get(key) not in (None, "")))


def is_marked_as_context(turn: Mapping[str, Any], role: str) -> bool:
    """Whether the data says that this turn is not to be learned: `loss: false`, `train: false`, `weight: 0` and others.

    Raises:
        ValueError: a value between, two marks that disagree, or a turn that is to be learned and not the assistant's.
    """
    learned: dict[str, bool] = {}
    for key in LEARNING:
        value = turn.get(key)
        if value is None:
            continue
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise ValueError(
                f"{key!r}: found {shown(value)}, expected true, false, 1 or 0: a turn is learned whole or not at all"
            )
        learned[key] = bool(value) == (key in _LEARNED)
    if len(set(learned.values())) > 1:
        raise ValueError(f"{' and '.join(map(repr, learned))} disagree on whether this turn is learned")
    if role != "assistant" and any(learned.values()):
        raise ValueError(f"{next(iter(learned))!r} asks to learn a {role} turn; only assistant turns can be learned")
    return bool(learned) and not any(learned.values())
