"""TRL's data set types: what a row becomes, and the prompt that two answers share."""

from collections.abc import Callable
from typing import Any

import needs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sources import said, turn

from uft_ds.data.example import Example, Message, Pair
from uft_ds.data.formats.fields import LeftOut, Row
from uft_ds.data.formats.trl import trl

USER, GOOD, BAD = turn("user", "q"), turn("assistant", "a"), turn("assistant", "b")
CALLS = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}


def read(row: Row, score: float | None = None) -> Example:
    (item,) = trl(row, score=score)
    assert isinstance(item, Example)
    return item


def read_pair(row: Row) -> Pair:
    (item,) = trl(row, score=0.123)
    assert isinstance(item, Pair)
    assert not item.scored
    return item


def test_trl_messages_are_supervised_in_every_assistant_turn() -> None:
    """Instruction data with the source's score; null columns are absent; tools may be JSON text."""
    row = {"messages": [USER, GOOD, USER, BAD], "prompt": None, "chosen": None, "tools": '[{"name": "f"}]'}
    example = read(row, score=0.5)
    assert [m.score for m in example.messages] == [None, 0.5, None, 0.5]
    assert (example.kind, example.tools) == ("instruction", ({"type": "function", "function": {"name": "f"}},))


@pytest.mark.parametrize("completion", ["a", [GOOD]])
@pytest.mark.parametrize("prompt", ["q", [USER]])
def test_trl_prompt_and_completion(prompt: Any, completion: Any) -> None:
    """Text and turns give the same: instruction data, or binary feedback with a label."""
    row = {"prompt": prompt, "completion": completion}
    assert read(row) == Example((Message("user", "q"), Message("assistant", "a", 1.0)), "instruction")
    assert read(row | {"label": False}) == Example((Message("user", "q"), Message("assistant", "a", 0.0)), "binary")


def test_trl_completion_of_several_turns() -> None:
    """The assistant's turns of the completion are supervised, those of the prompt are not."""
    row = {"prompt": [USER, GOOD, USER], "completion": [CALLS, turn("tool", "2"), BAD]}
    assert [m.score for m in read(row).messages] == [None, None, None, 1.0, None, 1.0]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [USER], "chosen": "a", "rejected": "b"},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": None, "completion": None, "messages": None, "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "q", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    ],
)
def test_trl_preferences_are_pairs(row: Row) -> None:
    """The prompt may be given, or be what both conversations begin with, even where a column repeats it as text."""
    item = read_pair(row)
    assert said(item.chosen) == [("user", "q", None), ("assistant", "a", 1.0)]
    assert said(item.rejected) == [("user", "q", None), ("assistant", "b", 0.0)]


# Computed with trl.data_utils.extract_prompt of TRL 1.16.0: chosen, rejected -> prompt, chosen, rejected.
EXTRACTED = [
    ("The sky is blue.", "The sky is green.", ("The sky is", " blue.", " green.")),
    ("The sky is  blue.", "The sky is  green.", ("The sky is ", " blue.", " green.")),
    ("Say abc", "Say ab", ("Say a", "bc", "b")),
    ("Say ab", "Say abc", ("Say a", "b", "bc")),
    ("a b c", "a bc", ("a b", " c", "c")),
    ("q:\nyes", "q:\nno", ("q:\n", "yes", "no")),
]


@pytest.mark.parametrize(("chosen", "rejected", "parts"), EXTRACTED)
def test_trl_prompt_of_two_texts(chosen: str, rejected: str, parts: tuple[str, str, str]) -> None:
    """It is cut where TRL cuts it: before a space, and one character early if one text begins the other."""
    item = read_pair({"chosen": chosen, "rejected": rejected})
    assert said(item.chosen) == [("user", parts[0], None), ("assistant", parts[1], 1.0)]
    assert said(item.rejected)[-1] == ("assistant", parts[2], 0.0)


@pytest.fixture(scope="module")
def extract_prompt() -> Callable[[Row], Row]:
    """TRL's own, where TRL is installed."""
    return needs.package("trl.data_utils").maybe_extract_prompt


@settings(deadline=None)
@given(st.text("ab ", max_size=6), st.text("ab ", max_size=6), st.text("ab ", max_size=6))
def test_trl_prompt_is_that_of_trl(extract_prompt: Callable[[Row], Row], common: str, first: str, second: str) -> None:
    """Whatever we make a pair of, TRL would cut in the same place."""
    row = {"chosen": common + first, "rejected": common + second}
    try:
        item = read_pair(row)
    except (ValueError, LeftOut):
        return
    prompt, chosen = (m.content for m in item.chosen.messages)
    ours = {"prompt": prompt, "chosen": chosen, "rejected": item.rejected.messages[-1].content}
    assert ours == extract_prompt(row)


@pytest.mark.parametrize("prompt", [{}, {"prompt": "q"}])
def test_trl_prompt_of_two_conversations_is_that_of_trl(
    extract_prompt: Callable[[Row], Row], prompt: dict[str, str]
) -> None:
    """The common turns are the prompt, there as here."""
    row = {"chosen": [USER, GOOD, USER, GOOD], "rejected": [USER, GOOD, USER, BAD]}
    theirs = extract_prompt({**row, **prompt})
    assert read_pair({**row, **prompt}) == read_pair(theirs)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "a", "rejected": "a"},
        {"chosen": "ab", "rejected": "ab"},
        {"chosen": [USER, GOOD], "rejected": [USER, GOOD]},
    ],
)
def test_trl_pair_of_equals_is_left_out(row: Row) -> None:
    """Neither is better, wherever the prompt is."""
    with pytest.raises(LeftOut, match="chosen equals rejected"):
        trl(row, score=None)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"text": "q a"},
            "'text' does not say what is prompt and what is response; expected 'prompt' and 'completion'",
        ),
        ({"prompt": "q"}, "found prompt"),
        ({"prompt": None}, "found nothing"),
        (
            {"messages": [USER, GOOD], "label": True},
            "'label' with 'messages' is not a type of TRL; use the format 'kto'",
        ),
        ({"messages": [USER, GOOD], "chosen": "a", "rejected": "b"}, "found chosen and messages"),
        ({"prompt": "q", "completion": "a", "rejected": "b"}, "found chosen and completion"),
        ({"messages": [USER]}, "holds no assistant turn"),
        ({"prompt": "q", "completion": "a", "label": 1}, "'label': found 1, expected true or false"),
        ({"prompt": [USER, GOOD], "completion": "a"}, "'prompt' must end with the user's turn"),
        ({"prompt": "q", "completion": [USER]}, "turn 1 (user): turns must alternate"),
        ({"prompt": [USER, CALLS, turn("tool", "2")], "completion": [turn("tool", "2")]}, "no assistant turn"),
        ({"completion": "a"}, "'prompt': expected text, found nothing"),
        ({"prompt": "q", "chosen": "a"}, "'rejected': expected text, found nothing"),
        ({"rejected": "a"}, "'chosen': expected text, found nothing"),
        ({"chosen": "a", "rejected": [BAD]}, "expected both as text or both as turns"),
        ({"chosen": "ab", "rejected": "cd"}, "have no beginning in common"),
        ({"chosen": "ab ", "rejected": "cd"}, "have no beginning in common"),
        ({"chosen": [USER, GOOD], "rejected": [turn("user", "r"), BAD]}, "differ at turn 0"),
        ({"chosen": [USER, GOOD], "rejected": [USER, GOOD, USER, BAD]}, "differ at turn 2"),
        (
            {"prompt": [USER], "chosen": [CALLS, turn("tool", "2"), GOOD], "rejected": [BAD]},
            "found assistant, tool, as",
        ),
    ],
)
def test_trl_refuses(row: Row, message: str) -> None:
    """A row of no type, of two types, or with nothing to supervise is refused."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - compared as plain text below
        trl(row, score=None)
    assert message in str(caught.value)
