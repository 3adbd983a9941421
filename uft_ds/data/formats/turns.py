"""The turns of a conversation: reading them from a row, checking their order, and choosing the supervised ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from uft_ds.data.example import Example, Kind, Message, Pair, Role
from uft_ds.data.formats.fields import LeftOut, Row, content, from_json, mapping, not_turns, shown, text
from uft_ds.data.formats.marks import check_turn_keys, extras_of, is_marked_as_context
from uft_ds.data.formats.scales import checked_score

Item = Example | Pair
Turns = tuple[Message, ...]
Tools = tuple[Mapping[str, Any], ...]

ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",  # OpenAI's newer name
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}


def conversation(value: Any, name: str = "messages") -> Turns:
    """Turns `[{role, content}, ...]`: an optional system turn, then user and assistant in alternation.

    An assistant turn with `tool_calls` may be empty, and tool turns may follow it before the next assistant turn.
    """
    turns = messages(value, name)
    check_turns(turns)
    return turns


def row_messages(row: Row) -> Turns:
    """The conversation in a row's `messages`: turns, or their JSON text, as csv files hold it."""
    return conversation(from_json(row.get("messages"), "messages"))


def messages(value: Any, name: str) -> Turns:
    """Turns in any order, for a part of a conversation."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"{name!r}: expected a list of turns, found {shown(value)}")
    turns = []
    for index, turn in enumerate(value):
        try:
            turns.append(_message(turn))
        except ValueError as error:
            raise ValueError(f"{name!r}, turn {index}: {error}") from None
    return tuple(turns)


def _message(turn: Any) -> Message:
    given = turn.get("role") if isinstance(turn, Mapping) else None
    if not isinstance(given, str) or given not in ROLES:
        raise ValueError(f"expected a role of system, developer, user, assistant or tool, found {shown(given)}")
    role, calls = ROLES[given], turn.get("tool_calls")
    check_turn_keys(turn)
    extras, is_context = extras_of(turn), is_marked_as_context(turn, role)
    if calls in (None, []):
        return Message(role, content(turn.get("content")), extras=extras, marked_as_context=is_context)
    if role != "assistant":
        raise ValueError(f"'tool_calls' in a {role} turn; only the assistant calls tools")
    said = "" if turn.get("content") is None else content(turn["content"], may_be_empty=True)
    return Message(role, said, tool_calls=tool_calls(calls), extras=extras, marked_as_context=is_context)


def tool_calls(value: Any) -> Tools:
    """Tool calls `[{name, arguments}, ...]`, bare or in OpenAI's `{type, function}`; returned in OpenAI's layout.

    Arguments given as JSON text are decoded, because chat templates write JSON and would quote the text again.
    """
    if not isinstance(value, list) or not value:
        raise ValueError(f"'tool_calls': expected a list of calls, found {shown(value)}")
    return tuple(_tool_call(mapping(call, "tool_calls")) for call in value)


def _tool_call(call: Mapping[str, Any]) -> Mapping[str, Any]:
    function = call if call.get("function") is None else mapping(call["function"], "function")
    given = function.get("arguments")
    # A call of a function without parameters has null or empty text there.
    arguments = {} if given in (None, "") else mapping(from_json(given, "arguments"), "arguments")
    named = {"id": text(call, "id")} if call.get("id") is not None else {}
    return {**named, "type": "function", "function": {"name": text(function, "name"), "arguments": arguments}}


def tool_schemas(value: Any) -> Tools:
    """Tools `[{name, parameters, ...}, ...]`, bare or in OpenAI's `{type, function}`; returned in OpenAI's layout."""
    if value is None:
        return ()
    if not isinstance(value, list):
        raise ValueError(f"'tools': expected a list of JSON schemas, found {shown(value)}")
    return tuple(_tool_schema(mapping(tool, "tools")) for tool in value)


def row_tools(row: Row) -> Tools:
    """The `tools` of a row, as a list or as JSON text, whole or each; empty if there are none."""
    value = row.get("tools")
    tools = None if value == "" else from_json(value, "tools")
    return tool_schemas([from_json(tool, "tools") for tool in tools] if isinstance(tools, list) else tools)


def _tool_schema(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    function = tool if tool.get("function") is None else mapping(tool["function"], "function")
    text(function, "name")
    return {"type": "function", "function": function} if function is tool else tool


def check_item(item: Item) -> None:
    """Check the item of any format, also of other packages: a conversation in order, with scores from 0 to 1.

    Raises:
        ValueError: says what the format gave and what was expected.
    """
    for example in (item.chosen, item.rejected) if isinstance(item, Pair) else (item,):
        if not isinstance(example, Example):
            raise ValueError(f"the format gave {type(example).__name__}, expected Example or Pair")
        check_turns(example.messages if example.exact is None else example.messages[:-1])
        scored = [index for index, turn in enumerate(example.messages) if turn.score is not None]
        if not scored or (isinstance(item, Pair) and scored != [len(example.messages) - 1]):
            raise ValueError(
                f"the format scored turns {scored}, expected {'the last' if isinstance(item, Pair) else 'one'}"
            )
        for index in scored:
            turn = example.messages[index]
            if turn.role != "assistant":
                raise ValueError(f"the format scored turn {index}, which is the {turn.role}'s")
            checked_score(turn.score, f"score of turn {index}")


def check_turns(turns: Sequence[Message]) -> None:
    """Check that turns have the order that chat templates expect, and content unless they call a tool.

    Raises:
        ValueError: names the turn.
    """
    before = None
    for index, turn in enumerate(turns):
        if turn.role == "tool" and not _may_have_result(before):
            raise ValueError(f"turn {index}: a tool turn must follow an assistant turn with tool_calls")
        if not (turn.role == "system" and index == 0) and not _may_follow(before, turn):
            raise ValueError(
                f"turn {index} ({turn.role}): turns must alternate user, assistant, after at most one system turn "
                "at the start"
            )
        if not turn.content.strip() and not turn.tool_calls:
            raise ValueError(f"an empty {turn.role} turn")
        before = turn


def _may_have_result(before: Message | None) -> bool:
    return before is not None and (before.role == "tool" or bool(before.tool_calls))


def _may_follow(before: Message | None, turn: Message) -> bool:
    if before is None or before.role == "system":
        return turn.role == "user"
    if before.role == "assistant":
        return turn.role in ("user", "tool")
    return turn.role == "assistant" or (before.role == turn.role == "tool")


def prompt_turns(value: Any, name: str) -> Turns:
    """The prompt of an answer: text (one user turn), or turns that end with a user or tool turn."""
    return (
        question_turns(value, name)
        if isinstance(value, list)
        else (Message("user", not_turns(content(value, name), name)),)
    )


def question_turns(value: Any, name: str) -> Turns:
    """A conversation up to an answer; its last turn must be a user or tool turn."""
    turns = conversation(value, name)
    if turns[-1].role not in ("user", "tool"):
        raise ValueError(f"{name!r} must end with the user's turn (or a tool's) that the response answers")
    return turns


def answer_turns(value: Any, name: str) -> Turns:
    """The turns after a prompt: text (one assistant turn), or turns."""
    if isinstance(value, list):
        return messages(value, name)
    return (Message("assistant", not_turns(content(value, name), name)),)


def one_answer(turns: Turns, name: str) -> Message:
    """The single turn of an answer whose feedback is about the whole answer."""
    if len(turns) != 1 or turns[0].role != "assistant":
        raise ValueError(f"{name!r}: expected one assistant turn, found {', '.join(turn.role for turn in turns)}")
    if turns[0].marked_as_context:
        raise ValueError(f"{name!r}: the answer is marked as not to be learned, and nothing else is; leave the row out")
    return turns[0]


def answered(prompt: Turns, answer: Message, score: float, kind: Kind, tools: Tools = ()) -> Example:
    """A prompt and its answer, the only supervised turn."""
    turns = (*prompt, replace(answer, score=score))
    check_turns(turns)
    return Example(turns, kind, tools)


def all_supervised(turns: Turns, score: float, tools: Tools = (), *, context: int = 0) -> Example:
    """Instruction data: every assistant turn after the first `context` turns is supervised, unless it is marked.

    Turns after the last supervised turn are dropped, because they cannot influence a response.

    Raises:
        LeftOut: the data marks every assistant turn as not to be learned.
        ValueError: there is no assistant turn.
    """
    assistants = [index for index, turn in enumerate(turns) if turn.role == "assistant" and index >= context]
    if not assistants:
        raise ValueError("the conversation holds no assistant turn")
    learned = {index for index in assistants if not turns[index].marked_as_context}
    if not learned:
        raise LeftOut("marked as not to be learned", len(assistants))
    scored = (replace(turn, score=score) if index in learned else turn for index, turn in enumerate(turns))
    return Example(tuple(scored)[: max(learned) + 1], "instruction", tools)


def check_prompt_is_said(row: Row, turns: Turns) -> None:
    """Check that a `prompt` beside whole conversations, which is not read, only repeats what is in their turns.

    Raises:
        ValueError: it holds something else.
    """
    prompt = row.get("prompt")
    if prompt in (None, "", []):
        return
    said = {turn.content.strip().casefold() for turn in turns}
    if not isinstance(prompt, str) or prompt.strip().casefold() not in said:
        raise ValueError(
            f"'prompt' is {shown(prompt)}, which is none of the turns: beside whole conversations it is not read; put "
            "it into the turns, or leave it out by the source's `columns: {prompt: null}`"
        )


def pair(
    prompt: Turns, chosen: Message, rejected: Message, scores: tuple[float, float] | None = None, tools: Tools = ()
) -> Pair:
    """Two answers to one prompt, with the scores of the data if there are any; equal scores make a tie.

    Raises:
        LeftOut: the answers are equal.
        ValueError: the rejected answer has the higher score.
    """
    better, worse = (1.0, 0.0) if scores is None else scores
    first, second = answered(prompt, chosen, better, "pair", tools), answered(prompt, rejected, worse, "pair", tools)
    if chosen == rejected:
        raise LeftOut("chosen equals rejected", 2)
    if better < worse:
        raise ValueError(f"the score of 'chosen' ({better:.4g}) is below that of 'rejected' ({worse:.4g})")
    return Pair(first, second, scored=scores is not None)


def dialogue_pair(chosen: Turns, rejected: Turns, scores: tuple[float, float] | None = None, tools: Tools = ()) -> Pair:
    """A pair from two whole conversations that differ only in their last turn."""
    if chosen[:-1] != rejected[:-1]:
        same = (a == b for a, b in zip(chosen, rejected, strict=False))
        where = next((index for index, equal in enumerate(same) if not equal), min(len(chosen), len(rejected)))
        raise ValueError(f"'chosen' and 'rejected' differ at turn {where}; expected one prompt and a last turn each")
    answers = one_answer(chosen[-1:], "chosen"), one_answer(rejected[-1:], "rejected")
    return pair(chosen[:-1], *answers, scores, tools)
