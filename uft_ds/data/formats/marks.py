"""The keys of a turn beside role and text: thoughts, marks that it is not to be learned, and keys without a reader."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from uft_ds.data.formats.fields import is_empty, shown, text

THOUGHTS = ("reasoning_content", "thinking", "reasoning")
"""Names of one thing, the first is ours; transformers' templates read the others as copies of it."""
OTHER_THOUGHTS = (
    *("thought", "thoughts", "think", "cot", "chain_of_thought", "rationale"),
    *("reasoning_text", "reasoning_details", "reasoning_trace", "thinking_content"),
)
"""Names of the same that no template reads."""

_LEARNED = ("loss", "train", "trainable", "training", "loss_mask", "loss_weight", "loss_scale", "weight")
NOT_LEARNED = ("masked",)
LEARNING = (*_LEARNED, *NOT_LEARNED)
"""Keys by which other programs say whether a turn is learned; `masked` (torchtune) says the opposite of the others."""
_WORDS_OF_LEARNING = frozenset({
    "loss", "losses", "train", "trainable", "training", "learn", "learned", "learnable",
    "supervise", "supervised", "supervision", "mask", "masks", "masked", "masking", "weight", "weights",
    "ignore", "ignored", "skip",
})  # fmt: skip

_EXTRAS = ("name", "tool_call_id")
TURN_KEYS = frozenset({"role", "content", "from", "value", "tool_calls", *THOUGHTS, *LEARNING, *_EXTRAS})
"""The keys of a turn that are read."""

_KINDS_OF_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
MEDIA = (
    *_KINDS_OF_MEDIA,
    *(f"{kind}_{place}" for kind in _KINDS_OF_MEDIA for place in ("url", "urls", "path", "paths", "bytes")),
    *("picture", "pictures", "img", "imgs", "pixel_values", "media", "attachment", "attachments"),
)
NO_TEXT = "only text is trained"
"""What is said of them."""
FEEDBACK = ("score", "label", "rating", "reward")
_UNREAD = {
    **dict.fromkeys(MEDIA, NO_TEXT),
    **dict.fromkeys(OTHER_THOUGHTS, "give a thought before the answer as 'reasoning_content'"),
    **dict.fromkeys(FEEDBACK, "give how good the answer is as a column of the row, in a format that reads it"),
    "function_call": "give it as 'tool_calls'",
    "tool_call": "give it as 'tool_calls'",
    "function_calls": "give them as 'tool_calls'",
    "functions": "give them as the row's 'tools'",
    "tools": "give them as the row's 'tools'",
    "tool_response": "give it as a turn of the tool",
    "tool_responses": "give them as turns of the tool",
    "context": "write it into the turn's text",
    "documents": "write them into the turn's text",
    "refusal": "write it as the turn's text",
    "train_detail": "a turn is learned as a whole; leave the key out, or divide the row",
    "reasoning_train_detail": "a turn is learned as a whole; leave the key out, or divide the row",
}


def plain(name: str) -> str:
    """A key in lower case, its words divided by underscores: `Loss-Mask` and `lossMask` are `loss_mask`."""
    divided = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name.strip())
    return re.sub(r"[-\s.]+", "_", divided).lower()


def is_of_learning(name: str) -> bool:
    """Whether a key's words say that it is about what is learned, by whatever name: `do_train`, `ignoreLoss`."""
    return not _WORDS_OF_LEARNING.isdisjoint(plain(name).split("_"))


def check_turn_keys(turn: Mapping[str, Any]) -> None:
    """Refuse a turn, or a part of its text, that says more than it is read for.

    Raises:
        ValueError: names the key that is known to carry meaning and has no reader, and what to do.
    """
    for key in _unread(turn):
        remedy = _UNREAD.get(plain(key)) or (
            f"it may say whether the turn is learned: give that as one of {', '.join(LEARNING)}, or leave it out"
        )
        raise ValueError(f"{key!r} in a turn is not read; {remedy}")
    content, value = turn.get("content"), turn.get("value")
    if not is_empty(content) and not is_empty(value) and content != value:
        raise ValueError("'content' and 'value' differ, but a turn has one text; keep one of them")
    for part in turn["content"] if isinstance(turn.get("content"), list) else ():
        marks = [key for key in _unread(part, LEARNING) if is_of_learning(key)] if isinstance(part, Mapping) else []
        if any(not says_learned(key, part[key]) for key in marks):
            raise ValueError(
                f"{marks[0]!r} in a part of a turn's text is not read; a turn is learned whole or not at all: leave "
                "the key out, or divide the row"
            )


def _unread(turn: Mapping[str, Any], names: tuple[str, ...] = ()) -> Iterator[str]:
    """The keys of a turn that carry meaning and are not read. names: keys that are not read here, either."""
    for key, value in turn.items():
        known = isinstance(key, str) and not is_empty(value) and (key not in TURN_KEYS or key in names)
        if known and (plain(key) in _UNREAD or is_of_learning(key)):
            yield key


def says_learned(name: str, value: Any) -> bool:
    """Whether a mark only says that all is learned, which is so without it."""
    return plain(name) in LEARNING and isinstance(value, bool | int | float) and value == (plain(name) in _LEARNED)


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
