"""Which columns of a row a format reads, and what becomes of the others.

A format declares its columns by `reads`. A column that it does not read is refused if it is known to change what a row
means (a system prompt, a picture, a score), because it would be lost silently; any other is counted by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeGuard, TypeVar

from uft_ds.data.formats.fields import Row, is_empty, is_number_in_quotes, shown
from uft_ds.data.formats.marks import (
    FEEDBACK,
    LEARNING,
    MEDIA,
    NO_TEXT,
    OTHER_THOUGHTS,
    THOUGHTS,
    TURN_KEYS,
    is_of_learning,
    plain,
    says_learned,
)
from uft_ds.errors import UserError

_Format = TypeVar("_Format", bound=Callable[..., Any])

_OF_THE_PROMPT = """
system system_prompt system_prompts system_message system_instruction system_instructions sys sys_prompt
custom_system_prompt developer developer_message preamble
prompt instruction instructions question query context contexts ctxs input inputs user_prompt user_message user_input
user_query history chat_history conversation_history dialog_history dialogue_history
document documents passage passages article retrieved_context retrieved_contexts retrieved_documents retrieved_passages
"""
_OF_A_CONVERSATION = """
messages conversation conversations dialogue dialogues
tools available_tools tool_schema tool_schemas functions function_call function_calls tool_call tool_calls
"""
_ASKED, _ANSWER, _TURNS = "part of what is asked", "an answer", "part of a conversation"
_THOUGHT = "a thought before the answer; it belongs into a turn's 'reasoning_content'"
_LEARNED = "whether, or how much, the row is learned"
_BY_NAME = {
    **dict.fromkeys(_OF_THE_PROMPT.split(), _ASKED),
    **dict.fromkeys(("response", "responses", "completion", "completions", "output", "outputs"), _ANSWER),
    **dict.fromkeys(MEDIA, NO_TEXT),
    **dict.fromkeys(_OF_A_CONVERSATION.split(), _TURNS),
    **dict.fromkeys((*THOUGHTS, *OTHER_THOUGHTS), _THOUGHT),
    **dict.fromkeys(("chat_template_kwargs", "enable_thinking"), "an argument of the chat template"),
    **dict.fromkeys((*LEARNING, "mask"), _LEARNED),
}
_OTHER_FEEDBACK = """
scores overall_score quality_score reward_score labels kto_tag ratings rewards preference preferred is_preferred
desirable is_desirable is_chosen accepted thumbs_up helpfulness correctness is_correct
"""
_FEEDBACK = {
    **dict.fromkeys((*FEEDBACK, *_OTHER_FEEDBACK.split()), "how good the answer is"),
    **dict.fromkeys(("chosen", "chosen_response", "chosen_messages", "chosen_output"), "a better answer"),
    **dict.fromkeys(
        ("rejected", "rejected_response", "rejected_responses", "rejected_messages", "rejected_output"),
        "a worse answer",
    ),
}
"""Carries meaning where a row would otherwise count as a perfect answer."""
_MAYBE_FEEDBACK = """
rank ranking quality star stars grade grades points value vote votes upvotes likes label_score
"""
_LIKE_A_SCORE = {*FEEDBACK, *_OTHER_FEEDBACK.split(), *_MAYBE_FEEDBACK.split()}
"""Names that may mean a score: those above, and words that mean something else as often, which refuse no row."""
_PROMPT_ELSEWHERE = {
    *("question", "query", "instruction", "problem"),
    *("user_prompt", "user_message", "user_input", "user_query"),
}
_RESPONSE_ELSEWHERE = {"answer", "completion", "output", "reply"}
OF_META = "meta."
"""Begins the names of keys of `meta` that may be a score."""
_MAY_REPEAT = (_ASKED, _ANSWER, _TURNS, _THOUGHT)
"""Columns that say nothing new if the row says the same elsewhere."""


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
    found = [(column, why) for column in _unread(row, make) if (why := _meaning(column, row[column], known))]
    if found:
        said = {text.strip() for column in columns_of(make) or () for text in _texts(row.get(column))}
        found = [(column, why) for column, why in found if why not in _MAY_REPEAT or not _repeats(row[column], said)]
    if not found:
        return None
    columns = columns_of(make) or ()
    named = ", ".join(f"{shown(column)} ({why})" for column, why in found[:4])
    message = f"not read by this format: {named}; it reads {', '.join(columns)}"
    other = next((column for column, why in found if why != NO_TEXT), None)
    if other is not None:
        message += (
            f". Give a column one of these names by the source's `columns: {{NAME: {other}}}`, or leave it out by "
            f"`columns: {{{other}: null}}`"
        )
    medium = next((column for column, why in found if why == NO_TEXT), None)
    return message if medium is None else f"{message}. {about_medium(medium)}"


def is_medium(column: str) -> bool:
    """Whether a column of this name holds pictures, films or sound."""
    return meaning_of(column) == NO_TEXT


def about_medium(column: str) -> str:
    """What to do about a column of pictures, films or sound, and what is lost by it."""
    return (
        "Rows with pictures, films or sound are refused, because only text is trained; the source's "
        f"`columns: {{{column}: null}}` reads their text alone, which then lacks what it speaks of"
    )


def known_elsewhere(column: str, value: Any) -> str | None:
    """Our name for a column that other data sets have: prompt, response, score, or label for true and false.

    None if there is none, or if what the column may be called is no score by its value.
    """
    name = plain(column)
    if name in _PROMPT_ELSEWHERE:
        return "prompt"
    if name in _RESPONSE_ELSEWHERE:
        return "response"
    if name not in _LIKE_A_SCORE:
        return None
    if isinstance(value, bool):
        return "label"
    # Cells of a csv file are text.
    return "score" if isinstance(value, int | float) or is_number_in_quotes(value) else None


def meaning_of(column: str) -> str | None:
    """What a column of this name is known to say, such as a part of what is asked."""
    return _BY_NAME.get(plain(column))


def unread_columns(row: Row, make: Callable[..., Any], *, has_feedback: bool = True) -> Iterator[str]:
    """The names of the columns that hold something and are not read; keys of turns as `messages[].key`.

    Args:
        has_feedback: see `refused_columns`; without any, keys of `meta` that may be a score are named as `meta.key`.
    """
    yield from _unread(row, make)
    meta = row.get("meta") if "meta" in (columns_of(make) or ()) and not has_feedback else None
    for key, value in meta.items() if isinstance(meta, Mapping) else ():
        if known_elsewhere(str(key), value) in ("score", "label"):
            yield f"{OF_META}{key}"
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


def _meaning(column: str, value: Any, known: Mapping[str, str]) -> str | None:
    """What a column says that a format does not read; None if that is not known."""
    name = plain(column)
    if says_learned(name, value):
        return None  # every row is learned as a whole
    # Other numbers are bookkeeping: `train_idx`, `avg_loss`, `weight_kg`.
    is_mark = is_of_learning(name) and (isinstance(value, bool | list) or value in (0, 1))
    return known.get(name) or (_LEARNED if is_mark else None)


def _texts(value: Any) -> Iterator[str]:
    """The texts in a value, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for member in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(member)


def _repeats(value: Any, said: Collection[str]) -> bool:
    """Whether a column holds only texts that the row says elsewhere, such as its question."""
    if isinstance(value, Mapping):
        return all(_repeats(member, said) for key, member in value.items() if key not in ("role", "from"))
    if isinstance(value, list | tuple):
        return all(_repeats(member, said) for member in value)
    return value is None or (isinstance(value, str) and value.strip() in said)


def _is_turn(value: Any) -> TypeGuard[Mapping[str, Any]]:
    return isinstance(value, Mapping) and ("role" in value or "from" in value)
