"""Columns and keys that a format does not read: refused where they change what a row means, otherwise counted."""

from collections.abc import Callable
from typing import Any

import pytest
from sources import said, turn

from uft_ds.data.example import Example, Message
from uft_ds.data.formats.chat import sharegpt, ultrachat
from uft_ds.data.formats.columns import check_renaming, columns_of, reads, refused_columns, unread_columns
from uft_ds.data.formats.feedback import kto
from uft_ds.data.formats.fields import LeftOut
from uft_ds.data.formats.jsonl import jsonl
from uft_ds.data.formats.table import FORMATS, described_formats
from uft_ds.data.formats.trl import trl
from uft_ds.errors import UserError

USER, DRAFT, GOOD = turn("user", "q"), turn("assistant", "draft"), turn("assistant", "good")


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_says_which_columns_it_reads(name: str) -> None:
    """Nothing that a row holds can be lost without a word."""
    columns = columns_of(FORMATS[name])
    assert columns
    assert described_formats()[name].endswith(f"Reads the columns {', '.join(columns)}.")


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "jsonl"])
@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("question", "What is 1 plus 1?"),
        ("System-Prompt", "Answer in French."),
        ("context", "A text."),
        ("images", ["a.jpg"]),
        ("audio", {"bytes": "x"}),
        ("functions", [{"name": "f"}]),
        ("reasoning", "First, ..."),
        ("loss_weight", 0.5),
        ("train", False),
        ("mask_history", True),
        ("ignoreLoss", 1),
        ("sampleWeights", [0.1]),
        ("mask", "User"),
        ("systemPrompt", "Answer in French."),
        ("system_instruction", "Answer in French."),
        ("chat_history", [["q", "a"]]),
        ("image_path", "a.jpg"),
        ("cot", "First, ..."),
        ("tool_schema", {"name": "f"}),
        ("chat_template_kwargs", {"enable_thinking": False}),
    ],
)
def test_a_column_that_carries_meaning_is_refused(name: str, column: str, value: Any) -> None:
    """The message names the column, and how to rename it or leave it out."""
    message = refused_columns({column: value}, FORMATS[name], has_feedback=True)
    assert message is not None
    assert message.startswith(f"not read by this format: '{column}' (")
    assert f"`columns: {{{column}: null}}`" in message


def test_leaving_out_pictures_is_told_what_it_costs() -> None:
    """They are no text by another name, and the text speaks of them; other columns keep their own remedy."""
    row = {"prompt": "What is it?", "completion": "A cat.", "images": ["cat.png"]}
    lost = (
        "Rows with pictures, films or sound are refused, because only text is trained; the source's "
        "`columns: {images: null}` reads their text alone, which then lacks what it speaks of"
    )
    reads = f"it reads {', '.join(columns_of(trl) or ())}"
    alone = f"not read by this format: 'images' (only text is trained); {reads}. {lost}"
    assert refused_columns(row, trl) == alone
    both = str(refused_columns(row | {"system": "s"}, trl))
    assert both.endswith(f"`columns: {{NAME: system}}`, or leave it out by `columns: {{system: null}}`. {lost}")


@pytest.mark.parametrize("value", [None, "", [], {}, [None, ""], {"a": None}])
def test_an_empty_column_carries_no_meaning(value: Any) -> None:
    """Arrow files and exports have empty columns for what a row does not have."""
    assert refused_columns({"prompt": "q", "images": value}, trl) is None
    assert list(unread_columns({"prompt": "q", "images": value}, trl)) == []


def test_a_score_is_refused_where_a_row_would_count_as_perfect() -> None:
    """A row whose score is not read is an answer of score 1; of a pair, the order is known without it."""
    row = {"prompt": "q", "rating": 2}
    assert "'rating' (how good the answer is)" in str(refused_columns(row, trl))
    assert refused_columns(row, trl, has_feedback=True) is None


@pytest.mark.parametrize(
    ("column", "value"),
    [("kto_tag", False), ("labels", False), ("quality_score", 0.1), ("rejected_response", "no"), ("rejected", [DRAFT])],
)
def test_feedback_of_other_programs_is_refused_where_a_row_would_count_as_perfect(column: str, value: Any) -> None:
    """LLaMA-Factory's `kto_tag`, ms-swift's `rejected_response`: the row says more than that its answer is right."""
    row = {"messages": [USER, GOOD], column: value}
    assert f"'{column}' (" in str(refused_columns(row, ultrachat))
    assert refused_columns(row, ultrachat, has_feedback=True) is None


@pytest.mark.parametrize("column", ["response", "output", "completion"])
def test_an_answer_that_is_not_read_is_refused_unless_it_repeats_a_turn(column: str) -> None:
    """An answer beside the turns may be the one that is meant; one that repeats a turn says nothing new."""
    row = {"messages": [USER, GOOD], column: "another"}
    assert f"'{column}' (an answer)" in str(refused_columns(row, ultrachat))
    assert refused_columns(row | {column: " good\n", "question": "q"}, ultrachat) is None
    assert refused_columns(row | {column: ["good", "another"]}, ultrachat) is not None


def test_a_prompt_or_turns_beside_what_is_read_are_refused() -> None:
    """`prompt` beside sharegpt's turns, and turns in a second layout."""
    row = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    assert refused_columns(row, sharegpt) is None
    assert "'prompt' (part of what is asked)" in str(refused_columns(row | {"prompt": "p"}, sharegpt))
    assert "'messages' (part of a conversation)" in str(refused_columns(row | {"messages": [USER, GOOD]}, sharegpt))
    same = [turn("user", "q"), turn("assistant", "a")]
    assert refused_columns(row | {"messages": same}, sharegpt) is None


def test_a_row_that_is_learned_says_nothing_new() -> None:
    """A blanket mark of other programs: true, or weight 1."""
    assert refused_columns({"weight": 1.0, "train": True, "masked": False}, trl) is None
    assert refused_columns({"masked": True}, trl) is not None


def test_bookkeeping_under_such_a_name_is_no_mark() -> None:
    """Counts and measurements whose names hold such a word; a truth value, 0 or a list for each turn is a mark."""
    row = {"train_idx": 17, "training_step": 300, "avg_loss": 1.3, "skip_count": 2, "weight_kg": 70}
    assert refused_columns(row, trl) is None
    assert set(unread_columns(row, trl)) == set(row)
    for mark in (False, 0, [0, 1]):
        assert refused_columns({"train_on": mark}, trl) is not None, mark


def test_other_columns_are_named() -> None:
    """Of the row, and of its turns; those of turns under the column that holds them."""
    row = {"messages": [USER | {"id": 1, "ts": None}, GOOD | {"model": "m"}], "source": "s", "prompt_id": "x"}
    assert list(unread_columns(row, ultrachat)) == ["source", "prompt_id", "messages[].id", "messages[].model"]


def test_a_format_of_another_package_may_say_what_it_reads() -> None:
    """Then its other columns are looked at as those of our own formats are."""

    def theirs(row: Any, *, score: float | None) -> list[Example]:
        return []

    assert columns_of(theirs) is None
    assert refused_columns({"system": "s"}, theirs) is None
    assert list(unread_columns({"x": "s"}, theirs)) == []
    assert refused_columns({"system": "s"}, reads("q")(theirs)) is not None


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ([("promt", "question")], "gives 'promt', which this format does not read; it reads messages, prompt,"),
        ([("prompt", "q"), ("completion", "q")], "takes 'q' twice"),
    ],
)
def test_a_renaming_that_cannot_be_is_refused(columns: list[tuple[str, str | None]], message: str) -> None:
    """A misspelt name, or one column for two."""
    with pytest.raises(UserError, match=message):
        check_renaming(columns, trl, "rows.jsonl")
    check_renaming([("prompt", "question"), ("system", None)], trl, "rows.jsonl")


# Turns

MARKS = [
    {"loss": False},
    {"train": False},
    {"trainable": False},
    {"loss_mask": 0},
    {"loss_weight": 0.0},
    {"weight": 0},
    {"masked": True},
    {"loss": False, "weight": 0, "masked": True},
]


@pytest.mark.parametrize("mark", MARKS, ids=str)
@pytest.mark.parametrize("make", [jsonl, trl, ultrachat])
def test_a_turn_marked_as_not_to_be_learned_is_context(make: Callable[..., Any], mark: dict[str, Any]) -> None:
    """It stays in the conversation without a score; turns after the last learned one are dropped."""
    (example,) = make({"messages": [USER, DRAFT | mark, USER, GOOD]}, score=None)
    assert said(example)[:2] == [("user", "q", None), ("assistant", "draft", None)]
    assert said(example)[2:] == [("user", "q", None), ("assistant", "good", 1.0)]
    (example,) = make({"messages": [USER, GOOD, USER, DRAFT | mark]}, score=None)
    assert said(example) == [("user", "q", None), ("assistant", "good", 1.0)]
    with pytest.raises(LeftOut, match="marked as not to be learned"):
        make({"messages": [USER, DRAFT | mark]}, score=None)


@pytest.mark.parametrize("mark", MARKS, ids=str)
def test_marks_of_sharegpt_turns_and_completions(mark: dict[str, Any]) -> None:
    """The same by another layout."""
    human, draft, good = ({"from": f, "value": v} for f, v in [("human", "q"), ("gpt", "draft"), ("gpt", "good")])
    (example,) = sharegpt({"conversations": [human, draft | mark, human, good]}, score=None)
    assert [m.score for m in example.messages] == [None, None, None, 1.0]
    (example,) = trl({"prompt": [USER], "completion": [DRAFT | mark, USER, GOOD]}, score=None)
    assert [m.score for m in example.messages] == [None, None, None, 1.0]


def test_an_answer_with_feedback_cannot_be_context() -> None:
    """Nothing of the row would be left."""
    for row in (
        {"messages": [USER, GOOD | {"train": False}], "label": True},
        {"prompt": "q", "completion": [GOOD | {"weight": 0}], "label": True},
    ):
        with pytest.raises(ValueError, match="the answer is marked as not to be learned"):
            kto(row, score=None)


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([USER, GOOD | {"weight": 0.5}], "turn 1: 'weight': found 0.5, expected true, false, 1 or 0"),
        ([USER, GOOD | {"loss": "false"}], "'loss': found 'false', expected true, false, 1 or 0"),
        ([USER, GOOD | {"loss_mask": [0, 1]}], "'loss_mask': found"),
        ([USER, GOOD | {"loss": True, "masked": True}], "'loss' and 'masked' disagree"),
        ([USER | {"train": True}, GOOD], "turn 0: 'train' asks to learn a user turn"),
        ([USER | {"images": ["a.png"]}, GOOD], "'images' in a turn is not read; only text is trained"),
        ([USER, GOOD | {"function_call": {"name": "f"}}], "'function_call' in a turn is not read; give it as 'tool_c"),
        ([USER, GOOD | {"thinking": "a", "reasoning": "b"}], "'thinking' and 'reasoning' differ"),
        ([USER, GOOD | {"thinking": [{"type": "text"}]}], "'thinking': expected text"),
        (
            [USER, GOOD | {"do_train": False}],
            "'do_train' in a turn is not read; it may say whether the turn is learned",
        ),
        ([USER, GOOD | {"mask": True}], "'mask' in a turn is not read; it may say whether the turn is learned"),
        ([USER, GOOD | {"lossMask": 0}], "'lossMask' in a turn is not read; it may say"),
        ([USER, GOOD | {"canTrainOn": False}], "'canTrainOn' in a turn is not read; it may say"),
        ([USER, GOOD | {"ignore": True}], "'ignore' in a turn is not read; it may say"),
        ([USER, GOOD | {"weights": [0, 1]}], "'weights' in a turn is not read; it may say"),
        ([USER, GOOD | {"score": 0.1}], "'score' in a turn is not read; give how good the answer is as a column"),
        ([USER, GOOD | {"thought": "hm"}], "'thought' in a turn is not read; give a thought before the answer as 'r"),
        ([USER | {"image_url": "a.png"}, GOOD], "'image_url' in a turn is not read; only text is trained"),
    ],
)
def test_keys_of_a_turn_that_cannot_be_followed_are_refused(turns: list[Any], message: str) -> None:
    """Weights in between, parts of a turn, pictures, older layouts of calls, two different thoughts."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - compared as plain text below
        trl({"messages": turns}, score=None)
    assert message in str(caught.value)
    speakers = {"user": "human", "assistant": "gpt"}
    layout = [
        {"from": speakers[t["role"]], "value": t["content"]}
        | {k: v for k, v in t.items() if k not in ("role", "content")}
        for t in turns
    ]
    with pytest.raises(ValueError, match="turn"):
        sharegpt({"conversations": layout}, score=None)


@pytest.mark.parametrize("mark", [{"train": False}, {"weight": 0}, {"loss": 0.5}, {"do_train": True}], ids=str)
def test_a_part_of_a_turns_text_cannot_be_marked(mark: dict[str, Any]) -> None:
    """axolotl marks parts of one answer; here a turn is learned whole, so a part with a mark is refused."""
    parts = [{"type": "text", "text": "draft "} | mark, {"type": "text", "text": "good"}]
    with pytest.raises(ValueError, match=f"'{next(iter(mark))}' in a part of a turn's text is not read"):
        trl({"messages": [USER, turn("assistant", parts)]}, score=None)
    said_learned = [part | {"train": True, "weight": 1} for part in parts if not mark.keys() & part.keys()]
    (example,) = trl({"messages": [USER, turn("assistant", said_learned)]}, score=None)
    assert example.messages[-1].content == "good"


def test_a_turn_has_one_text() -> None:
    """A turn of both layouts at once would lose one of its two texts."""
    with pytest.raises(ValueError, match="'content' and 'value' differ"):
        trl({"messages": [USER, GOOD | {"value": "other"}]}, score=None)
    both = {"from": "gpt", "value": "a", "role": "assistant", "content": "a"}
    (example,) = sharegpt({"conversations": [{"from": "human", "value": "q"}, both]}, score=None)
    assert example.messages[-1].content == "a"
    with pytest.raises(ValueError, match="'content' and 'value' differ"):
        sharegpt({"conversations": [{"from": "human", "value": "q"}, both | {"content": "b"}]}, score=None)


def test_a_call_beside_the_text_of_a_sharegpt_turn_is_refused() -> None:
    """A call is a turn of its own in this layout; the key would be lost."""
    call = {"from": "gpt", "value": "a", "tool_calls": [{"name": "f", "arguments": {}}]}
    with pytest.raises(ValueError, match="give a call as a turn from 'function_call'"):
        sharegpt({"conversations": [{"from": "human", "value": "q"}, call]}, score=None)


@pytest.mark.parametrize(
    "given", [{"thinking": "hm"}, {"reasoning": "hm"}, {"thinking": "hm", "reasoning_content": "hm"}]
)
def test_thoughts_have_one_name(given: dict[str, str]) -> None:
    """transformers' templates read all three as reasoning_content."""
    (example,) = trl({"messages": [USER, GOOD | given]}, score=None)
    assert example.messages[-1].extras == (("reasoning_content", "hm"),)


def test_a_developer_turn_is_a_system_turn() -> None:
    """OpenAI's newer name of the role; two of them in a row are one too many."""
    (example,) = trl({"messages": [turn("developer", "s"), USER, GOOD]}, score=None)
    assert example.messages[0] == Message("system", "s")
    with pytest.raises(ValueError, match="at most one system turn"):
        trl({"messages": [turn("system", "s"), turn("developer", "s"), USER, GOOD]}, score=None)


@pytest.mark.parametrize("arguments", [{}, {"arguments": ""}, {"arguments": None}, {"arguments": "{}"}])
def test_a_call_without_arguments_has_none(arguments: dict[str, Any]) -> None:
    """OpenAI writes empty text for a function without parameters, other programs null."""
    calls = [{"type": "function", "function": {"name": "f", **arguments}}]
    (example,) = trl({"messages": [USER, turn("assistant", None) | {"tool_calls": calls}]}, score=None)
    assert example.messages[-1].tool_calls[0]["function"] == {"name": "f", "arguments": {}}
