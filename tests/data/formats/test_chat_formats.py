"""Instruction data in the layouts of others: what a row becomes, and what is refused."""

import json
from typing import Any

import pytest
from sources import TURNS, said, turn

from uft_ds.data.example import Example, Message, Pair
from uft_ds.data.formats.chat import alpaca, sharegpt, ultrachat
from uft_ds.data.formats.fields import LeftOut, Row


def read(row: Row, score: float | None = None) -> Example:
    """A row of sharegpt."""
    (item,) = sharegpt(row, score=score)
    assert isinstance(item, Example)
    return item


# ultrachat


def test_ultrachat_supervises_every_assistant_turn() -> None:
    """A conversation of k assistant turns gives k responses of score 1; other turns carry none."""
    row = {"prompt": "q1", "prompt_id": "x", "messages": [*TURNS, turn("assistant", "a2")]}
    (example,) = ultrachat(row, score=None)
    assert [m.score for m in example.messages] == [None, None, 1.0, None, 1.0]
    assert [m.content for m in example.messages] == ["Be brief.", "q1", "a1", "q2", "a2"]
    assert example.kind == "instruction"


def test_ultrachat_takes_the_sources_score() -> None:
    """The recipe's constant stands on every response."""
    (example,) = ultrachat({"messages": [*TURNS, turn("assistant", "a2")]}, score=0.9)
    assert [m.score for m in example.messages if m.role == "assistant"] == [0.9, 0.9]


def test_ultrachat_drops_a_question_that_nobody_answered() -> None:
    """A last user turn cannot influence any response, so it is left out."""
    (example,) = ultrachat({"messages": TURNS}, score=None)
    assert [m.content for m in example.messages] == ["Be brief.", "q1", "a1"]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (None, "expected a list of turns, found null"),
        ([turn("user", "q")], "holds no assistant turn"),
        ([turn("system", "s")], "holds no assistant turn"),
        ([turn("user", "q"), turn("assistant", "a"), turn("assistant", "b")], "must alternate"),
        ([turn("assistant", "a")], "must alternate"),
        ([turn("user", "q"), turn("assistant", "")], "turn 1: 'content' is empty"),
    ],
)
def test_ultrachat_refuses(messages: Any, message: str) -> None:
    """A conversation without an answer, or out of order, is refused."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - compared as plain text below
        ultrachat({"messages": messages}, score=None)
    assert message in str(caught.value)


# alpaca


def test_alpaca_instruction_and_input_are_the_users_turn() -> None:
    """LLaMA-Factory's way: a newline between them, no template of Alpaca's own."""
    (example,) = alpaca({"instruction": "Add.", "input": "1, 2", "output": "3"}, score=None)
    assert example == Example((Message("user", "Add.\n1, 2"), Message("assistant", "3", 1.0)), "instruction")


@pytest.mark.parametrize("empty", [{}, {"input": ""}, {"input": None, "system": "", "history": []}])
def test_alpaca_empty_columns_are_absent(empty: dict[str, Any]) -> None:
    """An empty input leaves no newline behind, and an empty system or history no turn."""
    (example,) = alpaca({"instruction": "q", "output": "a", **empty}, score=0.5)
    assert said(example) == [("user", "q", None), ("assistant", "a", 0.5)]


def test_alpaca_history_is_context() -> None:
    """Earlier exchanges come before the question, after the system turn, and are not supervised."""
    row = {"instruction": "q2", "output": "a2", "system": "s", "history": [["q1", "a1"]]}
    (example,) = alpaca(row, score=None)
    assert said(example) == [
        ("system", "s", None),
        ("user", "q1", None),
        ("assistant", "a1", None),
        ("user", "q2", None),
        ("assistant", "a2", 1.0),
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output": ""}, "'output' is empty"),
        ({"instruction": ""}, "'instruction' is empty"),
        ({"input": 3}, "'input': expected text, found 3"),
        ({"input": " "}, "'input' is empty"),
        ({"history": [["q"]]}, "'history': expected a list of [question, answer], found [['q']]"),
        ({"history": "q"}, "'history': expected a list"),
        ({"history": [["q", ""]]}, "'history 0' is empty"),
        ({"system": ["s"]}, "'system': expected text"),
    ],
)
def test_alpaca_refuses(change: dict[str, Any], message: str) -> None:
    """Columns hold text, and the output has something in it."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - compared as plain text below
        alpaca({"instruction": "q", "output": "a"} | change, score=None)
    assert message in str(caught.value)


# sharegpt

CALL = {"name": "f", "arguments": {"x": 1}}


def speech(speaker: str, value: Any) -> dict[str, Any]:
    return {"from": speaker, "value": value}


ASKED = [speech("human", "q"), speech("gpt", "a")]


def test_sharegpt_supervises_every_gpt_turn() -> None:
    """Names of speakers become roles; the system turn comes from its own column as well."""
    turns = [speech("user", "q1"), speech("chatgpt", "a1"), speech("human", "q2"), speech("assistant", "a2")]
    example = read({"conversations": turns, "system": "s"}, score=0.5)
    assert said(example) == [
        ("system", "s", None),
        ("user", "q1", None),
        ("assistant", "a1", 0.5),
        ("user", "q2", None),
        ("assistant", "a2", 0.5),
    ]
    assert read({"conversations": [speech("system", "s"), *turns], "system": ""}, score=0.5) == example


def test_sharegpt_drops_a_question_that_nobody_answered() -> None:
    """What follows the last answer cannot influence it."""
    assert read({"conversations": [*ASKED, speech("human", "q2")]}) == read({"conversations": ASKED})


@pytest.mark.parametrize("tools", [[{"name": "f"}], '[{"name": "f"}]'])
def test_sharegpt_function_calls_are_supervised_and_observations_are_not(tools: Any) -> None:
    """A call is an assistant turn without text; its result is context; tools may be given as JSON text."""
    turns = [ASKED[0], speech("function_call", json.dumps(CALL)), speech("observation", "2"), ASKED[1]]
    example = read({"conversations": turns, "tools": tools})
    assert said(example) == [("user", "q", None), ("assistant", "", 1.0), ("tool", "2", None), ("assistant", "a", 1.0)]
    assert example.messages[1].tool_calls == ({"type": "function", "function": CALL},)
    assert example.tools == ({"type": "function", "function": {"name": "f"}},)


def test_sharegpt_several_calls_at_once() -> None:
    """A list of calls is one turn."""
    example = read({"conversations": [ASKED[0], speech("function_call", json.dumps([CALL, CALL]))]})
    assert len(example.messages[1].tool_calls) == 2


def test_sharegpt_label_is_binary_feedback_on_the_last_turn() -> None:
    """A bad answer is not taken for instruction data."""
    example = read({"conversations": [*ASKED, *ASKED], "label": False})
    assert [m.score for m in example.messages] == [None, None, None, 0.0]
    assert example.kind == "binary"


def test_sharegpt_chosen_and_rejected_are_a_pair() -> None:
    """The conversation is the prompt, and its own answers are context."""
    row = {"conversations": [*ASKED, speech("human", "q2")], "chosen": speech("gpt", "b"), "rejected": ASKED[1]}
    (item,) = sharegpt(row, score=0.5)
    assert isinstance(item, Pair)
    prompt = [("user", "q", None), ("assistant", "a", None), ("user", "q2", None)]
    assert said(item.chosen) == [*prompt, ("assistant", "b", 1.0)]
    assert said(item.rejected) == [*prompt, ("assistant", "a", 0.0)]
    assert (item.chosen.kind, item.rejected.kind, item.scored) == ("pair", "pair", False)


def test_sharegpt_pair_of_equals_is_left_out() -> None:
    """Neither is better."""
    with pytest.raises(LeftOut, match="chosen equals rejected"):
        sharegpt({"conversations": ASKED[:1], "chosen": ASKED[1], "rejected": ASKED[1]}, score=None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conversations": None}, "'conversations': expected a list of turns, found null"),
        ({"conversations": [speech("bot", "a")]}, "turn 0': expected 'from' to be one of system, developer, human"),
        ({"conversations": [speech("human", "")]}, "'conversations, turn 0': 'value' is empty"),
        ({"conversations": ASKED[:1]}, "holds no assistant turn"),
        ({"conversations": ASKED[1:]}, "turn 0 (assistant): turns must alternate"),
        ({"conversations": [*ASKED, speech("observation", "2")]}, "a tool turn must follow"),
        ({"conversations": [ASKED[0], speech("function_call", "f(1)")]}, "'value': expected JSON, found 'f(1)'"),
        ({"conversations": [ASKED[0], speech("function_call", "3")]}, "'tool_calls': expected an object, found 3"),
        ({"conversations": [speech("system", "s"), *ASKED], "system": "s"}, "one system turn at the start"),
        ({"tools": "{"}, "'tools': expected JSON"),
        ({"label": 1}, "'label': found 1"),
        ({"conversations": ASKED[:1], "label": True}, "'conversations': expected one assistant turn, found user"),
        ({"chosen": ASKED[1], "rejected": speech("gpt", "b")}, "turn 2 (assistant): turns must alternate"),
        ({"chosen": ASKED[1]}, "'rejected': expected 'from' to be one of"),
        ({"chosen": ASKED[1], "rejected": ASKED[0]}, "'rejected': expected one assistant turn, found user"),
    ],
)
def test_sharegpt_refuses(change: dict[str, Any], message: str) -> None:
    """Speakers are known and take turns, and calls are JSON."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - compared as plain text below
        sharegpt({"conversations": ASKED, **change}, score=None)
    assert message in str(caught.value)
