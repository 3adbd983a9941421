"""TRL's data set types: what a row becomes, and the prompt that two answers share."""

from collections.abc import Callable
from typing import Any

import needs
import pytest
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


@pytest.fixture(scope="module")
def extract_prompt() -> Callable[[Row], Row]:
    """TRL's own, where TRL is installed."""
    return needs.package("trl.data_utils").maybe_extract_prompt


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
        ({"chosen": "The sky is blue.", "rejected": "The sky is bright."}, "expected 'prompt' beside 'chosen' and"),
        ({"chosen": "ab", "rejected": "ab"}, "add 'prompt', or give both as turns [{role, content}, ...]"),
        (
            {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
            "these are dialogues of the format 'hh_rlhf'",
        ),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "label": True}, "'label' with 'chosen' and 'rejected'"),
        ({"prompt": "other", "messages": [USER, GOOD]}, "'prompt' is 'other', which is none of the turns"),
        ({"prompt": [USER], "messages": [USER, GOOD]}, "which is none of the turns"),
        ({"prompt": "other", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "'prompt' is 'other', which is none"),
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
