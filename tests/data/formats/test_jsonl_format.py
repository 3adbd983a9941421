"""Our own format: what a row becomes, what is refused, and that its schema says the same."""

import json
import re
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sources import TURNS, turn

from uft_ds.data.example import Example, Message, Pair
from uft_ds.data.formats.fields import LeftOut, Row
from uft_ds.data.formats.jsonl import KEYS, jsonl, jsonl_schema


def read(row: Row, score: float | None = None) -> Example:
    (item,) = jsonl(row, score=score)
    assert isinstance(item, Example)
    return item


def turns_of(row: Row, score: float | None = None) -> tuple[Message, ...]:
    return read(row, score).messages


def test_jsonl_prompt_without_score_is_instruction_data() -> None:
    """Instruction data has score 1 (UFT Eq. 7), and only the response carries it."""
    example = read({"prompt": "q", "response": "a"})
    assert example.messages == (Message("user", "q"), Message("assistant", "a", 1.0))
    assert example.kind == "instruction"


def test_jsonl_source_score_is_for_rows_without_one() -> None:
    """The source's constant replaces a missing score or null, never a given one, nor does it change the kind."""
    without = read({"prompt": "q", "response": "a", "score": None}, score=0.5)
    given = read({"prompt": "q", "response": "a", "score": 0}, score=0.5)
    assert (without.messages[-1].score, without.kind) == (0.5, "instruction")
    assert (given.messages[-1].score, given.kind) == (0.0, "score")
    assert isinstance(given.messages[-1].score, float)


@given(st.floats(0, 1) | st.integers(0, 1))
def test_jsonl_any_score_from_0_to_1_is_kept(score: float) -> None:
    """A score in the range arrives unchanged."""
    assert turns_of({"prompt": "q", "response": "a", "score": score})[-1].score == score


def test_jsonl_messages_before_the_response_are_context() -> None:
    """Earlier assistant turns are not supervised: they carry no score."""
    messages = turns_of({"messages": TURNS, "response": "a2", "score": 0.7})
    assert [(m.role, m.content) for m in messages] == [(t["role"], t["content"]) for t in TURNS] + [("assistant", "a2")]
    assert [m.score for m in messages] == [None] * 4 + [0.7]


def test_jsonl_text_is_kept_as_it_is() -> None:
    """White space around a text and any script belong to the text."""
    assert turns_of({"prompt": " \n日本 \t", "response": "\n a\u2028b\n"})[1].content == "\n a\u2028b\n"


def test_jsonl_meta_is_ignored() -> None:
    """`meta` may hold anything, a misleading score included."""
    row = {"prompt": "q", "response": "a", "score": 0.5}
    assert turns_of(row | {"meta": {"score": 9, "id": [1]}}) == turns_of(row)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": None}, "either 'prompt' or 'messages', found neither"),
        ({"messages": TURNS}, "either 'prompt' or 'messages', found both"),
        ({"scroe": 0.3}, "unknown key 'scroe'; did you mean 'score'?"),
        ({"id": 3}, "unknown key 'id'; put extra fields under 'meta'"),
        ({"score": 1.01}, "'score': found 1.01, expected a number from 0 to 1"),
        ({"score": -1e-9}, "'score': found -1e-09"),
        ({"score": float("nan")}, "'score': found nan"),
        ({"score": float("inf")}, "'score': found inf"),
        ({"score": 10**400}, "'score': found 1000"),
        ({"score": "0.7"}, "'score': found '0.7', expected a number from 0 to 1: write it without quotes"),
        ({"score": True}, "'score': found true, expected a number"),
        ({"score": [1]}, "'score': found [1], expected a number"),
        ({"response": ""}, "'response' is empty"),
        ({"response": " \n\t\u3000"}, "'response' is empty"),
        ({"response": None}, "'response': expected text, found nothing"),
        ({"response": 5}, "'response': expected text, found 5"),
        ({"response": "a\ud83d"}, "'response': holds half of a surrogate pair"),
        ({"response": "a\0b"}, "'response': holds a NUL character"),
        ({"label": True}, "expected either 'score' or 'label', found both"),
        ({"score": None, "label": 1}, "'label': found 1, expected true or false: write 1 as true and 0 as false"),
        ({"score": None, "label": -1}, "'label': found -1, expected true or false"),
        ({"score": None, "label": "True"}, "'label': found 'True', expected true or false: write it without quotes"),
        ({"chosen": "b"}, "'response' does not go with 'chosen'"),
        ({"response": None, "chosen": "b"}, "'score' does not go with 'chosen'"),
        ({"tools": []}, "'tools' goes with 'messages', not with 'prompt'"),
        ({"prompt": ""}, "'prompt' is empty"),
        ({"prompt": ["q"]}, "'prompt': expected text, found ['q']"),
        ({"prompt": "\udc00"}, "'prompt': holds half of a surrogate pair"),
    ],
)
def test_jsonl_refuses(change: dict[str, Any], message: str) -> None:
    """A row that would train something else than meant is refused, with what was found."""
    row = {"prompt": "q", "response": "a", "score": 0.5} | change
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - compared as plain text below
        turns_of(row)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "expected a list of turns, found []"),
        ("q", "expected a list of turns, found 'q'"),
        ([turn("user", "q"), turn("assistant", "a")], "must end with the user's turn"),
        ([turn("system", "s")], "must end with the user's turn"),
        ([turn("user", "q"), turn("user", "q")], "must alternate"),
        ([turn("assistant", "a"), turn("user", "q")], "must alternate"),
        ([turn("user", "q"), turn("assistant", "a"), turn("system", "s"), turn("user", "q")], "one system turn at the"),
        ([turn("system", "s"), turn("system", "s"), turn("user", "q")], "one system turn at the start"),
        ([turn("human", "q")], "turn 0: expected a role of system, developer, user, assistant or tool"),
        ([turn("user", "q"), turn("assistant", " "), turn("user", "q")], "turn 1: 'content' is empty"),
        ([{"role": "user"}], "turn 0: 'content': expected text, found nothing"),
        (["q"], "turn 0: expected a role"),
        ([turn("user", "q\udfff")], "turn 0: 'content': holds half of a surrogate pair"),
        ([turn("user", [{"type": "image_url"}])], "'content', part 0: found 'image_url'; only parts of type 'text'"),
        ([turn("user", ["q"])], "'content', part 0: found 'q'; only parts of type 'text'"),
        ([turn("user", [{"type": "text", "text": " "}])], "turn 0: 'content' is empty"),
        ([turn("user", "q\0")], "turn 0: 'content': holds a NUL character"),
    ],
)
def test_jsonl_refuses_a_conversation(messages: Any, message: str) -> None:
    """Turns alternate, hold text, and end with the question; the message names the turn."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - compared as plain text below
        turns_of({"messages": messages, "response": "a"})
    assert message in str(caught.value)


CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CALLED = [turn("user", "q"), {"role": "assistant", "content": None, "tool_calls": [CALL]}, turn("tool", "2")]
PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(("label", "score"), [(True, 1.0), (False, 0.0)])
def test_jsonl_label_is_binary_feedback(label: bool, score: float) -> None:
    """A label becomes 1 or 0, whatever the source's score."""
    example = read({"prompt": "q", "response": "a", "label": label}, score=0.5)
    assert (example.messages[-1].score, example.kind) == (score, "binary")


def test_jsonl_chosen_and_rejected_are_a_pair() -> None:
    """Without scores the chosen answer has 1 and the rejected 0, and the pair says that these are not of the data."""
    (item,) = jsonl(PAIR, score=0.5)
    question = Message("user", "q")
    assert item == Pair(
        Example((question, Message("assistant", "a", 1.0)), "pair"),
        Example((question, Message("assistant", "b", 0.0)), "pair"),
        scored=False,
    )


def test_jsonl_pair_keeps_the_scores_of_the_data() -> None:
    """Scores given for both sides arrive on them, and the pair says so."""
    (item,) = jsonl(PAIR | {"score_chosen": 0.5, "score_rejected": 0}, score=None)
    assert isinstance(item, Pair)
    assert (item.chosen.messages[-1].score, item.rejected.messages[-1].score, item.scored) == (0.5, 0.0, True)


def test_jsonl_pair_of_equal_scores_is_a_tie() -> None:
    """Two scored responses, and no preference."""
    (item,) = jsonl(PAIR | {"score_chosen": 0.5, "score_rejected": 0.5}, score=None)
    assert isinstance(item, Pair)
    assert item.is_tie


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rejected": "a"}, "chosen equals rejected"),
        ({"rejected": "a", "score_chosen": 0.5, "score_rejected": 0.5}, "chosen equals rejected"),
    ],
)
def test_jsonl_pair_without_a_better_side_is_left_out(change: dict[str, Any], reason: str) -> None:
    """Such a row is no error: its two responses are counted by the reason."""
    with pytest.raises(LeftOut) as caught:
        jsonl(PAIR | change, score=None)
    assert (caught.value.reason, caught.value.num_responses) == (reason, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rejected": None}, "'rejected': expected text, found nothing"),
        ({"chosen": None}, "'chosen': expected text, found nothing"),
        ({"score_chosen": 0.5}, "'score_rejected': found null, expected a number"),
        ({"score_rejected": 0.5}, "'score_chosen': found null, expected a number"),
        ({"score_chosen": 0.25, "score_rejected": 0.5}, "'chosen' (0.25) is below that of 'rejected' (0.5)"),
        ({"score_chosen": 1.5, "score_rejected": 0.5}, "'score_chosen': found 1.5"),
        ({"label": True}, "'label' does not go with 'chosen'"),
    ],
)
def test_jsonl_refuses_a_pair(change: dict[str, Any], message: str) -> None:
    """Half a pair, half its scores, or scores that contradict it are refused."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - compared as plain text below
        jsonl(PAIR | change, score=None)
    assert message in str(caught.value)


def test_jsonl_messages_alone_are_supervised_in_every_assistant_turn() -> None:
    """A whole conversation is instruction data; calls of tools are supervised, their results are not."""
    example = read({"messages": [*CALLED, turn("assistant", "a")], "tools": [TOOL]}, score=0.75)
    assert [(m.role, m.content, m.score) for m in example.messages] == [
        ("user", "q", None),
        ("assistant", "", 0.75),
        ("tool", "2", None),
        ("assistant", "a", 0.75),
    ]
    assert (example.messages[1].tool_calls, example.tools, example.kind) == ((CALL,), (TOOL,), "instruction")


def test_jsonl_messages_alone_must_end_with_the_assistant() -> None:
    """A forgotten response is not taken for a conversation."""
    with pytest.raises(ValueError, match="'messages' must end with an assistant turn, or the row hold 'response'"):
        jsonl({"messages": TURNS}, score=None)


@pytest.mark.parametrize("key", ["score", "label", "score_chosen"])
def test_jsonl_feedback_needs_what_it_is_on(key: str) -> None:
    """A score or label on a whole conversation is refused, for it does not say which turn it is of."""
    with pytest.raises(ValueError, match=r"'messages' must end with the user's turn"):
        jsonl({"messages": [*TURNS, turn("assistant", "a2")], key: True}, score=None)


def test_jsonl_a_response_may_follow_a_tools_result() -> None:
    """Context may end with a tool turn."""
    assert [m.score for m in turns_of({"messages": CALLED, "response": "a", "score": 1})] == [None] * 3 + [1.0]


BARE = CALL["function"]


@pytest.mark.parametrize(
    "call", [CALL, BARE, {"function": BARE}, BARE | {"arguments": '{"x": 1}'}, CALL | {"id": None}], ids=str
)
def test_tool_calls_become_openais_layout(call: Row) -> None:
    """Bare calls are wrapped, and arguments decoded: a template would quote JSON text once more."""
    messages = [turn("user", "q"), turn("assistant", "") | {"tool_calls": [call]}]
    assert turns_of({"messages": messages})[1].tool_calls == (CALL,)


def test_a_bare_tool_becomes_openais_layout() -> None:
    """Templates of today are trained on `{type, function}`."""
    row = {"messages": [turn("user", "q"), turn("assistant", "a")], "tools": [TOOL["function"]]}
    assert read(row).tools == (TOOL,)


def test_text_parts_are_joined() -> None:
    """OpenAI's list of parts becomes one text, if all are text."""
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "\nb"}]
    assert turns_of({"messages": [turn("user", parts)], "response": "c"})[0].content == "a\nb"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([turn("user", "q"), turn("tool", "2")], "turn 1: a tool turn must follow an assistant turn with tool_calls"),
        ([turn("user", "q"), turn("assistant", "a"), turn("tool", "2")], "turn 2: a tool turn must follow"),
        ([turn("tool", "2")], "turn 0: a tool turn must follow"),
        ([*CALLED, turn("user", "q")], "turn 3 (user): turns must alternate"),
        ([turn("user", "q") | {"tool_calls": [CALL]}], "turn 0: 'tool_calls' in a user turn"),
        ([turn("user", "q"), turn("assistant", "") | {"tool_calls": 1}], "turn 1: 'tool_calls': expected a list"),
        ([turn("user", "q"), turn("assistant", "") | {"tool_calls": ["f"]}], "'tool_calls': expected an object"),
        ([turn("user", "q"), turn("assistant", "") | {"tool_calls": [{"arguments": {}}]}], "'name': expected text"),
        (
            [turn("user", "q"), turn("assistant", "") | {"tool_calls": [{"name": "f", "arguments": 3}]}],
            "'arguments': expected an obj",
        ),
        (
            [turn("user", "q"), turn("assistant", "") | {"tool_calls": [{"name": "f", "arguments": "{"}]}],
            "'arguments': expected JSON, found '{'",
        ),
        (
            [turn("user", "q"), turn("assistant", "") | {"tool_calls": [{"name": "f", "arguments": {"x": "\ud83d"}}]}],
            "'tool_calls': holds half of a surrogate pair",
        ),
        (
            [turn("user", "q"), turn("assistant", "") | {"tool_calls": [{"name": "f", "arguments": '{"x": NaN}'}]}],
            "'arguments': cannot be written as JSON",
        ),
        ([turn("user", "q"), turn("assistant", "") | {"tool_calls": []}], "turn 1: 'content' is empty"),
    ],
)
def test_jsonl_refuses_tools_out_of_place(messages: Any, message: str) -> None:
    """Only the assistant calls, only a call has a result, and both can be written into a prompt."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - compared as plain text below
        jsonl({"messages": messages}, score=None)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ("[]", "'tools': expected a list of JSON schemas, found '[]'"),
        ([3], "'tools': expected an object, found 3"),
        ([{}], "'name': expected text, found nothing"),
    ],
)
def test_jsonl_refuses_tools(tools: Any, message: str) -> None:
    """Tools are a list of schemas with a name."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - compared as plain text below
        jsonl({"messages": TURNS, "response": "a", "tools": tools}, score=None)
    assert message in str(caught.value)


# the schema

SCHEMA = jsonschema.Draft202012Validator(jsonl_schema())
WHOLE = [*CALLED, turn("assistant", "a")]
GOOD: list[dict[str, Any]] = [
    {"prompt": "q", "response": "a"},
    {"prompt": "q", "messages": None, "response": "a", "score": None, "label": None, "meta": {"score": 9}},
    {"prompt": "q", "response": "a", "score": 0.5},
    {"prompt": "q", "response": "a", "label": False, "chosen": None, "rejected": None},
    {"messages": TURNS, "response": "a2", "score": 1},
    {"messages": CALLED, "response": "a", "tools": [TOOL, TOOL["function"]]},
    {"messages": WHOLE, "tools": None},
    {"messages": WHOLE, "response": None, "score": None},
    {"messages": [turn("user", [{"type": "text", "text": "q"}]), turn("assistant", "a") | {"tool_calls": None}]},
    {"messages": [turn("user", "q"), {"role": "assistant", "tool_calls": [BARE | {"arguments": "{}"}]}]},
    {"messages": [turn("developer", "s"), turn("user", "q"), {"role": "assistant", "tool_calls": [{"name": "f"}]}]},
    {"messages": [turn("user", "q"), {"role": "assistant", "tool_calls": [{"name": "f", "arguments": None}]}]},
    PAIR,
    PAIR | {"score_chosen": 1, "score_rejected": 0.25},
    PAIR | {"prompt": None, "messages": TURNS, "response": None},
]
BAD: list[dict[str, Any]] = [
    {},
    {"prompt": "q"},
    {"response": "a"},
    {"prompt": "q", "messages": TURNS, "response": "a"},
    {"prompt": None, "messages": None, "response": "a"},
    {"prompt": "q", "response": ""},
    {"prompt": "q", "response": " \n\u3000"},
    {"prompt": "q", "response": "a\0"},
    {"prompt": 3, "response": "a"},
    {"prompt": "q", "response": ["a"]},
    {"prompt": "q", "response": "a", "scroe": 1},
    {"prompt": "q", "response": "a", "score": 1.5},
    {"prompt": "q", "response": "a", "score": -0.5},
    {"prompt": "q", "response": "a", "score": True},
    {"prompt": "q", "response": "a", "score": "1"},
    {"prompt": "q", "response": "a", "label": 1},
    {"prompt": "q", "response": "a", "label": True, "score": 1},
    {"prompt": "q", "response": "a", "tools": [TOOL]},
    {"prompt": "q", "response": "a", "chosen": "b", "rejected": "c"},
    {"prompt": "q", "response": "a", "score_chosen": 1},
    {"messages": [], "response": "a"},
    {"messages": "q", "response": "a"},
    {"messages": [turn("human", "q")], "response": "a"},
    {"messages": [turn("user", "")], "response": "a"},
    {"messages": [turn("user", None)], "response": "a"},
    {"messages": [turn("user", [{"type": "image_url"}])], "response": "a"},
    {"messages": [turn("user", [{"type": "text", "text": " "}])], "response": "a"},
    {"messages": [turn("user", [])], "response": "a"},
    {"messages": [turn("user", "q") | {"tool_calls": [CALL]}], "response": "a"},
    {"messages": ["q"], "response": "a"},
    {"messages": WHOLE, "score": 0.5},
    {"messages": WHOLE, "label": True},
    {"messages": WHOLE, "tools": "[]"},
    {"messages": WHOLE, "tools": [{}]},
    {"messages": WHOLE, "tools": [{"function": {}}]},
    {"messages": [turn("user", "q"), {"role": "assistant", "tool_calls": [{"name": "f", "arguments": 3}]}]},
    {"messages": [turn("user", "q"), {"role": "assistant", "tool_calls": [{"function": 3}]}]},
    {"messages": [turn("user", "q"), {"role": "assistant", "tool_calls": [CALL | {"id": 3}]}]},
    {"messages": [turn("user", "q"), {"role": "assistant", "tool_calls": {}}]},
    PAIR | {"rejected": None},
    PAIR | {"label": True},
    PAIR | {"score_chosen": 1},
    PAIR | {"score_chosen": 1, "score_rejected": None},
    PAIR | {"score_chosen": 2, "score_rejected": 1},
]


def accepts(row: Row) -> bool:
    try:
        jsonl(row, score=None)
    except LeftOut:
        return True
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("row", [*GOOD, *BAD], ids=json.dumps)
def test_schema_and_format_agree(row: dict[str, Any]) -> None:
    """An editor that knows the schema underlines what training would refuse."""
    assert accepts(row) == SCHEMA.is_valid(row) == (row in GOOD)


def test_schema_is_a_schema() -> None:
    """It is valid draft 2020-12 and knows the same keys as the format."""
    jsonschema.Draft202012Validator.check_schema(jsonl_schema())
    assert set(jsonl_schema()["properties"]) == set(KEYS)


VALUES = [None, "q", " ", 0.5, 2, True, [], TURNS, WHOLE, CALLED, [TOOL]]


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS), st.sampled_from(VALUES)))
def test_schema_refuses_nothing_that_the_format_takes(row: dict[str, Any]) -> None:
    """What the schema cannot say makes it more generous than the format, never less."""
    assert SCHEMA.is_valid(row) or not accepts(row)


_META = "only what is not to be trained on goes under 'meta'"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "q", "response": "a", "reward": 0.5},
            f"'reward'; if 'reward' is the score, set this source's `columns: {{score: reward}}`; {_META}",
        ),
        (
            {"prompt": "q", "response": "a", "Stars": "4"},
            f"'Stars'; if 'Stars' is the score, set this source's `columns: {{score: Stars}}`; {_META}",
        ),
        (
            {"prompt": "q", "response": "a", "is_correct": False},
            f"'is_correct'; if 'is_correct' is the score, set this source's `columns: {{label: is_correct}}`; {_META}",
        ),
        (
            {"question": "q", "answer": "a"},
            "'question'; set this source's `columns: {prompt: question, response: answer}`",
        ),
        (
            {"question": "q", "answer": "a", "grade": 0.1},
            "'question'; if 'grade' is the score, set this source's "
            f"`columns: {{prompt: question, response: answer, score: grade}}`; {_META}",
        ),
        ({"prompt": "q", "response": "a", "score": 1, "rating": 5}, "'rating'; put extra fields under 'meta'"),
        ({"prompt": "q", "response": "a", "value": "a text"}, "'value'; put extra fields under 'meta'"),
        *(
            (
                {"prompt": "q", "response": "a", "source": "s", key: ["cat.png"]},
                f"{key!r}. Rows with pictures, films or sound are refused, because only text is trained; the source's "
                f"`columns: {{{key}: null}}` reads their text alone, which then lacks what it speaks of",
            )
            for key in ("images", "image", "videos", "Image-Path")
        ),
        ({"prompt": "q", "response": "a", "context": "c"}, f"'context', by its name part of what is asked; {_META}"),
    ],
)
def test_an_unknown_key_is_answered_by_what_it_may_mean(row: dict[str, Any], message: str) -> None:
    """A score under `meta` would make every row an answer of score 1, and a question there would never be asked."""
    with pytest.raises(ValueError, match="^" + re.escape(f"unknown key {message}") + "$"):
        jsonl(row, score=None)
