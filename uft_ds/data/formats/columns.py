"""Which columns of a row a format reads, and what becomes of the others.

A format declares its columns by `reads`. A column that it does not read is refused if it is known to change what a row
means (a system prompt, a picture, a score), because it would be lost silently; any other is counted by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeGuard, TypeVar

from uft_ds.data.formats.fields import Row, is_empty, shown
from uft_ds.data.formats.marks import LEARNING, MEDIA, NOT_LEARNED, THOUGHTS, TURN_KEYS
from uft_ds.errors import UserError

_Format = TypeVar("_Format", bound=Callable[..., Any])

_OF_THE_PROMPT = (
    "system system_prompt system_message instruction instructions question query context input inputs history"
)
_BY_NAME = {
    **dict.fromkeys(_OF_THE_PROMPT.split(), "part of what is asked"),
    **dict.fromkeys(("document", "documents", "passages"), "part of what is asked"),
    **dict.fromkeys(MEDIA, "only text is supported"),
    **dict.fromkeys(("tools", "functions", "function_call", "function_calls", "tool_calls"), "part of a conversation"),
    **dict.fromkeys(THOUGHTS, "a thought before the answer; it belongs into a turn's 'reasoning_content'"),
    **dict.fromkeys(("chat_template_kwargs", "enable_thinking"), "an argument of the chat template"),
    **dict.fromkeys(LEARNING, "whether, or how much, the row is learned"),
}
_FEEDBACK = dict.fromkeys(("score", "label", "rating", "reward"), "how good the answer is")
"""Carries meaning where a row would otherwise count as a perfect answer."""


def reads(*columns: str) -> Callable[[_Format], _Format]:
    """Declare the columns that a format reads. Without it, nothing is said about the columns that it does not read."""

    def declared(make: _Format) -> _Format:
        make.reads = columns  # type: ignore[attr-defined]
        return make

    return declared


def columns_of(make: Callable[..., Any]) -> tuple[str, ...] | None:
    """The columns that a format reads; None if it does not say."""
    return getattr(make, "reads", None)


def refused_columns(row: Row, make: Callable[..., Any], *, has_feedback: bool = False) -> str | None:
    """Why the columns that a format does not read make a row a bad row; None if they do not.

    Args:
        has_feedback: whether the row has a score or a label that is read.
    """
    known = _BY_NAME if has_feedback else {**_BY_NAME, **_FEEDBACK}
    found = [(column, known[name]) for column in _unread(row, make) if (name := _plain(column)) in known]
    found = [(column, why) for column, why in found if not _says_learned(_plain(column), row[column])]
    if not found:
        return None
    columns = columns_of(make) or ()
    named = ", ".join(f"{shown(column)} ({why})" for column, why in found[:4])
    return (
        f"not read by this format: {named}; it reads {', '.join(columns)}. Give a column one of these names by the "
        f"source's `columns: {{NAME: {found[0][0]}}}`, or leave it out by `columns: {{{found[0][0]}: null}}`"
    )


def unread_columns(row: Row, make: Callable[..., Any]) -> Iterator[str]:
    """The names of the columns that hold something and are not read; keys of turns as `messages[].key`."""
    yield from _unread(row, make)
    for column in columns_of(make) or ():
        value = row.get(column)
        turns = value if isinstance(value, list) else [value]
        keys = {key for turn in turns if _is_turn(turn) for key, member in turn.items() if not is_empty(member)}
        yield from (f"{column}[].{key}" for key in sorted(map(str, keys - TURN_KEYS)))


def check_renaming(columns: Sequence[tuple[str, str | None]], make: Callable[..., Any], label: str) -> None:
    """Check a source's `columns`: what the format calls a column, and the name it has in the data or null.

    Raises:
        UserError: the format reads no such column, or one column of the data is to be two.
    """
    known = columns_of(make)
    theirs = [given for _, given in columns if given is not None]
    for ours, given in columns:
        if given is not None and known is not None and ours not in known:
            raise UserError(
                f"{label}: `columns` gives {ours!r}, which this format does not read; it reads {', '.join(known)} "
                f"(the format's name comes first: {{{known[0]}: {given}}})"
            )
        if given is not None and theirs.count(given) > 1:
            raise UserError(f"{label}: `columns` takes {given!r} twice; a column can be read as one other only")


def _unread(row: Row, make: Callable[..., Any]) -> Iterable[str]:
    columns = columns_of(make)
    return [] if columns is None else [key for key, value in row.items() if key not in columns and not is_empty(value)]


def _says_learned(name: str, value: Any) -> bool:
    """Whether a column only says that the row is learned as a whole, which every row is."""
    return name in LEARNING and isinstance(value, bool | int | float) and value == (name not in NOT_LEARNED)


def _is_turn(value: Any) -> TypeGuard[Mapping[str, Any]]:
    return isinstance(value, Mapping) and ("role" in value or "from" in value)


def _plain(column: str) -> str:
    return column.strip().lower().replace("-", "_").replace(" ", "_")
