"""Source formats: what a row becomes, and what is refused."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uft_ds.data.example import Message
from uft_ds.data.formats import FORMATS, Row, helpsteer2, jsonl, ultrachat

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "q1"},
    {"role": "assistant", "content": "a1"},
    {"role": "user", "content": "q2"},
]
BEST = {"helpfulness": 4, "correctness": 4, "coherence": 4, "complexity": 2, "verbosity": 2}


def turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def read_jsonl(row: Row, score: float | None = None) -> tuple[Message, ...]:
    return jsonl(row, score=score, origin="f:1").messages


# jsonl


def test_jsonl_prompt_without_score_is_instruction_data() -> None:
    """Instruction data has score 1 (UFT Eq. 7), and only the response carries it."""
    example = jsonl({"prompt": "q", "response": "a"}, score=None, origin="f:1")
    assert example.messages == (Message("user", "q"), Message("assistant", "a", 1.0))
    assert (example.kind, example.origin) == ("instruction", "f:1")


def test_jsonl_source_score_is_for_rows_without_one() -> None:
    """The source's constant replaces a missing score or null, never a given one, nor does it change the kind."""
    without = jsonl({"prompt": "q", "response": "a", "score": None}, score=0.5, origin="f:1")
    given = jsonl({"prompt": "q", "response": "a", "score": 0}, score=0.5, origin="f:1")
    assert (without.messages[-1].score, without.kind) == (0.5, "instruction")
    assert (given.messages[-1].score, given.kind) == (0.0, "score")
    assert isinstance(given.messages[-1].score, float)


@given(st.floats(0, 1) | st.integers(0, 1))
def test_jsonl_any_score_from_0_to_1_is_kept(score: float) -> None:
    """A score in the range arrives unchanged."""
    assert read_jsonl({"prompt": "q", "response": "a", "score": score})[-1].score == score


def test_jsonl_messages_before_the_response_are_context() -> None:
    """Earlier assistant turns are not supervised: they carry no score."""
    messages = read_jsonl({"messages": TURNS, "response": "a2", "score": 0.7})
    assert [(m.role, m.content) for m in messages] == [(t["role"], t["content"]) for t in TURNS] + [("assistant", "a2")]
    assert [m.score for m in messages] == [None] * 4 + [0.7]


def test_jsonl_text_is_kept_as_it_is() -> None:
    """White space around a text and any script belong to the text."""
    assert read_jsonl({"prompt": " \n日本 \t", "response": "\n a\u2028b\n"})[1].content == "\n a\u2028b\n"


def test_jsonl_meta_is_ignored() -> None:
    """`meta` may hold anything, a misleading score included."""
    row = {"prompt": "q", "response": "a", "score": 0.5}
    assert read_jsonl(row | {"meta": {"score": 9, "id": [1]}}) == read_jsonl(row)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": None}, "either 'prompt' or 'messages', found neither"),
        ({"messages": TURNS}, "either 'prompt' or 'messages', found both"),
        ({"scroe": 0.3}, "unknown key 'scroe'; did you mean 'score'?"),
        ({"id": 3}, "unknown key 'id'; put extra fields under 'meta'"),
        ({"score": 1.01}, "'score': found 1.01, expected a finite number from 0 to 1"),
        ({"score": -1e-9}, "'score': found -1e-09"),
        ({"score": float("nan")}, "'score': found nan"),
        ({"score": float("inf")}, "'score': found inf"),
        ({"score": 10**400}, "'score': found 1000"),
        ({"score": "0.7"}, "'score': found '0.7', expected a number"),
        ({"score": True}, "'score': found True, expected a number"),
        ({"score": [1]}, "'score': found [1], expected a number"),
        ({"response": ""}, "'response' is empty"),
        ({"response": " \n\t\u3000"}, "'response' is empty"),
        ({"response": None}, "'response': expected text, found nothing"),
        ({"response": 5}, "'response': expected text, found 5"),
        ({"response": "a\ud83d"}, "'response': holds half of a surrogate pair"),
        ({"prompt": ""}, "'prompt' is empty"),
        ({"prompt": ["q"]}, "'prompt': expected text, found ['q']"),
        ({"prompt": "\udc00"}, "'prompt': holds half of a surrogate pair"),
    ],
)
def test_jsonl_refuses(change: dict[str, Any], message: str) -> None:
    """A row that would train something else than meant is refused, with what was found."""
    row = {"prompt": "q", "response": "a", "score": 0.5} | change
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - compared as plain text below
        read_jsonl(row)
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
        ([turn("human", "q")], "turn 0: expected a role of system, user or assistant"),
        ([turn("user", "q"), turn("assistant", " "), turn("user", "q")], "turn 1: 'content' is empty"),
        ([{"role": "user"}], "turn 0: 'content': expected text, found nothing"),
        (["q"], "turn 0: expected a role"),
        ([turn("user", "q\udfff")], "turn 0: 'content': holds half of a surrogate pair"),
        ([turn("user", [{"type": "text", "text": "q"}])], "turn 0: 'content': expected text"),
    ],
)
def test_jsonl_refuses_a_conversation(messages: Any, message: str) -> None:
    """Turns alternate, hold text, and end with the question; the message names the turn."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - compared as plain text below
        read_jsonl({"messages": messages, "response": "a"})
    assert message in str(caught.value)


# ultrachat


def test_ultrachat_supervises_every_assistant_turn() -> None:
    """A conversation of k assistant turns gives k responses of score 1; other turns carry none."""
    row = {"prompt": "q1", "prompt_id": "x", "messages": [*TURNS, turn("assistant", "a2")]}
    example = ultrachat(row, score=None, origin="f:1")
    assert [m.score for m in example.messages] == [None, None, 1.0, None, 1.0]
    assert [m.content for m in example.messages] == ["Be brief.", "q1", "a1", "q2", "a2"]
    assert example.kind == "instruction"


def test_ultrachat_takes_the_sources_score() -> None:
    """The recipe's constant stands on every response."""
    example = ultrachat({"messages": [*TURNS, turn("assistant", "a2")]}, score=0.9, origin="f:1")
    assert [m.score for m in example.messages if m.role == "assistant"] == [0.9, 0.9]


def test_ultrachat_drops_a_question_that_nobody_answered() -> None:
    """A last user turn cannot influence any response, so it is left out."""
    example = ultrachat({"messages": TURNS}, score=None, origin="f:1")
    assert [m.content for m in example.messages] == ["Be brief.", "q1", "a1"]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (None, "expected a list of turns, found None"),
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
        ultrachat({"messages": messages}, score=None, origin="f:1")
    assert message in str(caught.value)


# helpsteer2


@pytest.mark.parametrize(
    ("attributes", "score"),
    [
        ((4, 4, 4), 1.0),  # (2.6 + 3.2 + 1.8) / 7.6
        ((0, 0, 0), 0.0),
        ((3, 4, 4), 6.95 / 7.6),
        ((4, 3, 4), 6.8 / 7.6),
        ((4, 4, 3), 7.15 / 7.6),
        ((1, 2, 3), 3.6 / 7.6),  # 0.65 + 1.6 + 1.35
        ((2, 2, 2), 0.5),
    ],
)
def test_helpsteer2_score(attributes: tuple[int, int, int], score: float) -> None:
    """(0.65 helpfulness + 0.8 correctness + 0.45 coherence) / 7.6, UNA (arXiv 2408.15339) section 4."""
    names = ("helpfulness", "correctness", "coherence")
    row = {"prompt": "q", "response": "a", **dict(zip(names, attributes, strict=True)), "complexity": 1, "verbosity": 4}
    example = helpsteer2(row, score=0.123, origin="f:1")
    assert example.messages[-1].score == pytest.approx(score, abs=1e-12)
    assert example.messages[:-1] == (Message("user", "q"),)
    assert example.kind == "score"


@given(*[st.integers(0, 4)] * 3)
def test_helpsteer2_scores_never_leave_the_unit_interval(a: int, b: int, c: int) -> None:
    """Rounding does not carry the best row above 1."""
    row = BEST | {"helpfulness": a, "correctness": b, "coherence": c, "prompt": "q", "response": "a"}
    score = helpsteer2(row, score=None, origin="f:1").messages[-1].score
    assert score is not None
    assert 0.0 <= score <= 1.0


def test_helpsteer2_conversation_in_the_prompt_is_parsed() -> None:
    """The markers and the newline before and after each are layout; only the last response is supervised."""
    user, assistant = "\n<extra_id_1>User\n", "\n<extra_id_1>Assistant\n"
    prompt = f"q1\nmore{assistant}a1\n\nend{user}q2{assistant}a2{user}q3"
    example = helpsteer2(BEST | {"prompt": prompt, "response": "a3\n"}, score=None, origin="f:1")
    assert [(m.role, m.content, m.score) for m in example.messages] == [
        ("user", "q1\nmore", None),
        ("assistant", "a1\n\nend", None),
        ("user", "q2", None),
        ("assistant", "a2", None),
        ("user", "q3", None),
        ("assistant", "a3\n", 1.0),
    ]


def test_helpsteer2_a_marker_in_the_response_is_text() -> None:
    """Only the prompt is parsed."""
    response = "b\n<extra_id_1>User\nc"
    assert (
        helpsteer2(BEST | {"prompt": "q", "response": response}, score=None, origin="x").messages[1].content == response
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"helpfulness": 5}, "'helpfulness': found 5, expected an integer from 0 to 4"),
        ({"correctness": -1}, "'correctness': found -1"),
        ({"coherence": True}, "'coherence': found True"),
        ({"coherence": 3.0}, "'coherence': found 3.0"),
        ({"coherence": "3"}, "'coherence': found '3'"),
        ({"correctness": None}, "'correctness': found None"),
        ({"response": ""}, "'response' is empty"),
        ({"prompt": None}, "'prompt': expected text, found nothing"),
        ({"prompt": "q\n<extra_id_1>Assistant\na"}, "must alternate"),
        ({"prompt": "q\n<extra_id_1>User\nq"}, "must alternate"),
        ({"prompt": "q\n<extra_id_1>Assistant\n \n<extra_id_1>User\nq"}, "an empty assistant turn"),
    ],
)
def test_helpsteer2_refuses(change: dict[str, Any], message: str) -> None:
    """Attributes are integers from 0 to 4, and the turns of a prompt end with the user's."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - compared as plain text below
        helpsteer2(BEST | {"prompt": "q", "response": "a"} | change, score=None, origin="f:1")
    assert message in str(caught.value)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_refuses_an_empty_row(name: str) -> None:
    """No format makes an example out of nothing."""
    with pytest.raises(ValueError, match="expected"):
        FORMATS[name]({}, score=None, origin="f:1")
