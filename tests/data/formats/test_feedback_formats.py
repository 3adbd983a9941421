"""Feedback data in the layouts of others: what a row becomes, what is left out and what is refused."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sources import said, turn

from uft_ds.data.example import Example, Message, Pair
from uft_ds.data.formats.feedback import (
    helpsteer2,
    helpsteer2_preference,
    hh_rlhf,
    kto,
    ultrafeedback,
    ultrafeedback_binarized,
)
from uft_ds.data.formats.fields import LeftOut, Row
from uft_ds.data.formats.table import FORMATS

BEST = {"helpfulness": 4, "correctness": 4, "coherence": 4, "complexity": 2, "verbosity": 2}


def read_pair(name: str, row: Row) -> Pair:
    (item,) = FORMATS[name](row, score=0.123)
    assert isinstance(item, Pair)
    return item


def reason(name: str, row: Row) -> tuple[str, int]:
    with pytest.raises(LeftOut) as caught:
        FORMATS[name](row, score=None)
    return caught.value.reason, caught.value.num_responses


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
    (example,) = helpsteer2(row, score=0.123)
    assert example.messages[-1].score == pytest.approx(score, abs=1e-12)
    assert example.messages[:-1] == (Message("user", "q"),)
    assert example.kind == "score"


@given(*[st.integers(0, 4)] * 3)
def test_helpsteer2_scores_never_leave_the_unit_interval(a: int, b: int, c: int) -> None:
    """Rounding does not carry the best row above 1."""
    row = BEST | {"helpfulness": a, "correctness": b, "coherence": c, "prompt": "q", "response": "a"}
    (example,) = helpsteer2(row, score=None)
    score = example.messages[-1].score
    assert score is not None
    assert 0.0 <= score <= 1.0


def test_helpsteer2_conversation_in_the_prompt_is_parsed() -> None:
    """The markers and the newline before and after each are layout; only the last response is supervised."""
    user, assistant = "\n<extra_id_1>User\n", "\n<extra_id_1>Assistant\n"
    prompt = f"q1\nmore{assistant}a1\n\nend{user}q2{assistant}a2{user}q3"
    (example,) = helpsteer2(BEST | {"prompt": prompt, "response": "a3\n"}, score=None)
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
    (example,) = helpsteer2(BEST | {"prompt": "q", "response": response}, score=None)
    assert example.messages[1].content == response


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"helpfulness": 5}, "'helpfulness': found 5, expected an integer from 0 to 4"),
        ({"correctness": -1}, "'correctness': found -1"),
        ({"coherence": True}, "'coherence': found true"),
        ({"coherence": 3.0}, "'coherence': found 3.0"),
        ({"coherence": "3"}, "'coherence': found '3'"),
        ({"correctness": None}, "'correctness': found null"),
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
        helpsteer2(BEST | {"prompt": "q", "response": "a"} | change, score=None)
    assert message in str(caught.value)


PREFERENCE = {"prompt": "q", "response_1": "a", "response_2": "b", "preference_strength": 1}


@pytest.mark.parametrize(("strength", "better"), [(-3, "a"), (-1, "a"), (1, "b"), (3, "b")])
def test_helpsteer2_preference_is_negative_for_the_first(strength: int, better: str) -> None:
    """The sign says which response is better; the size is not used."""
    item = read_pair("helpsteer2_preference", PREFERENCE | {"preference_strength": strength})
    worse = {"a": "b", "b": "a"}[better]
    assert said(item.chosen) == [("user", "q", None), ("assistant", better, 1.0)]
    assert said(item.rejected) == [("user", "q", None), ("assistant", worse, 0.0)]
    assert (item.scored, item.chosen.kind) == (False, "pair")


def test_helpsteer2_preference_without_one_is_left_out() -> None:
    """Strength 0 is a tie, equal responses are equal."""
    assert reason("helpsteer2_preference", PREFERENCE | {"preference_strength": 0}) == ("tie", 2)
    assert reason("helpsteer2_preference", PREFERENCE | {"response_2": "a"}) == ("chosen equals rejected", 2)


def test_helpsteer2_preference_prompts_are_parsed() -> None:
    """They hold conversations as the ratings' do."""
    prompt = "q1\n<extra_id_1>Assistant\na1\n<extra_id_1>User\nq2"
    item = read_pair("helpsteer2_preference", PREFERENCE | {"prompt": prompt})
    assert [m.role for m in item.chosen.messages] == ["user", "assistant", "user", "assistant"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"preference_strength": 4}, "'preference_strength': found 4, expected an integer from -3 to 3"),
        ({"preference_strength": "1"}, "'preference_strength': found '1'"),
        ({"preference_strength": False}, "'preference_strength': found false"),
        ({"response_2": ""}, "'response_2' is empty"),
        ({"preference_strength": 0, "response_1": None}, "'response_1': expected text"),
    ],
)
def test_helpsteer2_preference_refuses(change: dict[str, Any], message: str) -> None:
    """A bad row is refused even if it is a tie."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - compared as plain text below
        helpsteer2_preference(PREFERENCE | change, score=None)
    assert message in str(caught.value)


# ultrafeedback


def test_ultrafeedback_gives_an_example_per_completion() -> None:
    """Score (s - 1) / 9: 10 is 1, 1 is 0, 5.5 is 0.5; the models' own columns are ignored."""
    scores = {"a": 10, "b": 1.0, "c": 5.5}
    completions = [{"model": "m", "response": k, "overall_score": v, "critique": "?"} for k, v in scores.items()]
    items = ultrafeedback({"instruction": "q", "completions": completions}, score=0.123)
    assert items == [
        Example((Message("user", "q"), Message("assistant", said, score)), "score")
        for said, score in (("a", 1.0), ("b", 0.0), ("c", 0.5))
    ]


def test_ultrafeedback_without_completions_is_left_out() -> None:
    """There is nothing wrong with the row, and nothing to train on."""
    assert reason("ultrafeedback", {"instruction": "q", "completions": []}) == ("no completions", 0)


@pytest.mark.parametrize(
    ("completion", "message"),
    [
        ({"response": "b"}, "'completions', number 1: 'overall_score': found null, expected a number from 1 to 10"),
        ({"response": "b", "overall_score": "7"}, "number 1: 'overall_score': found '7'"),
        ({"response": "b", "overall_score": 0}, "number 1: 'overall_score': found 0"),
        ({"response": "b", "overall_score": 10.5}, "number 1: 'overall_score': found 10.5"),
        ({"response": "b", "overall_score": float("nan")}, "number 1: 'overall_score': found nan"),
        ({"response": "b", "overall_score": True}, "number 1: 'overall_score': found true"),
        ({"response": "", "overall_score": 7}, "number 1: 'response' is empty"),
        ("b", "number 1: expected an object, found 'b'"),
    ],
)
def test_ultrafeedback_refuses(completion: Any, message: str) -> None:
    """A completion without a score or text is named by its number, from 0."""
    row = {"instruction": "q", "completions": [{"response": "a", "overall_score": 7}, completion]}
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - compared as plain text below
        ultrafeedback(row, score=None)
    assert message in str(caught.value)


# ultrafeedback_binarized

SIDES = {"prompt": "q", "chosen": "a", "rejected": "b"}
TENS = {"score_chosen": 10.0, "score_rejected": 5.5}


@pytest.mark.parametrize(
    "scores",
    [TENS, {"metadata": TENS}, {"chosen-rating": 5.0, "rejected-rating": 3.0}],
    ids=["own", "meta", "argilla"],
)
def test_ultrafeedback_binarized_scores(scores: dict[str, Any]) -> None:
    """(10 - 1) / 9 = 1 and (5.5 - 1) / 9 = 0.5; Argilla's ratings end at 5: (3 - 1) / 4 = 0.5."""
    item = read_pair("ultrafeedback_binarized", SIDES | scores)
    assert said(item.chosen) == [("user", "q", None), ("assistant", "a", 1.0)]
    assert said(item.rejected) == [("user", "q", None), ("assistant", "b", 0.5)]
    assert item.scored


@pytest.mark.parametrize("prompt", [[turn("user", "q")], []], ids=["whole", "answer alone"])
def test_ultrafeedback_binarized_sides_may_be_turns(prompt: list[Any]) -> None:
    """The same pair, whether the sides repeat the prompt or not."""
    sides = {"chosen": [*prompt, turn("assistant", "a")], "rejected": [*prompt, turn("assistant", "b")]}
    text = read_pair("ultrafeedback_binarized", SIDES | TENS)
    assert read_pair("ultrafeedback_binarized", SIDES | sides | TENS) == text


def test_ultrafeedback_binarized_without_a_better_side() -> None:
    """Equal scores are a tie, whatever the columns' names say; equal texts with different scores are left out."""
    assert read_pair("ultrafeedback_binarized", SIDES | TENS | {"score_rejected": 10}).is_tie
    assert not read_pair("ultrafeedback_binarized", SIDES | TENS).is_tie
    assert reason("ultrafeedback_binarized", SIDES | TENS | {"rejected": "a"}) == ("chosen equals rejected", 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score_rejected": None}, "'score_rejected': found null, expected a number from 1 to 10"),
        ({"score_chosen": None}, "'score_chosen': found null"),
        ({"chosen-rating": 6, "rejected-rating": 2}, "'chosen-rating': found 6, expected a number from 1 to 5"),
        ({"score_chosen": 2}, "'chosen' (0.1111) is below that of 'rejected' (0.5)"),
        ({"rejected": ""}, "'rejected' is empty"),
        ({"prompt": None}, "'prompt': expected text, found nothing"),
        ({"chosen": [turn("user", "q"), turn("assistant", "a")]}, "'chosen': expected text"),
        (
            {
                "chosen": [turn("user", "q"), turn("assistant", "a")],
                "rejected": [turn("user", "r"), turn("assistant", "b")],
            },
            "'chosen' and 'rejected' differ at turn 0",
        ),
        ({"chosen": [turn("user", "q")], "rejected": [turn("user", "r")]}, "'chosen': expected one assistant turn"),
    ],
)
def test_ultrafeedback_binarized_refuses(change: dict[str, Any], message: str) -> None:
    """Missing scores, scores against the preference and different prompts are refused."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - compared as plain text below
        ultrafeedback_binarized(SIDES | TENS | change, score=None)
    assert message in str(caught.value)


# hh_rlhf


def dialogue(*turns: str) -> str:
    speakers = ("Human", "Assistant") * len(turns)
    return "".join(f"\n\n{speaker}: {text}" for speaker, text in zip(speakers, turns, strict=False))


def test_hh_rlhf_dialogues_are_split_into_turns() -> None:
    """Blank lines inside a turn stay, white space around it is layout; the last turns are the two answers."""
    common = ("q1", "a1\n\nmore", "q2: Human: x")
    item = read_pair("hh_rlhf", {"chosen": dialogue(*common, "good\n"), "rejected": dialogue(*common, " bad")})
    context = [("user", "q1", None), ("assistant", "a1\n\nmore", None), ("user", "q2: Human: x", None)]
    assert said(item.chosen) == [*context, ("assistant", "good", 1.0)]
    assert said(item.rejected) == [*context, ("assistant", "bad", 0.0)]
    assert not item.scored


def test_hh_rlhf_equal_dialogues_are_left_out() -> None:
    """Neither is better."""
    row = {"chosen": dialogue("q", "a"), "rejected": dialogue("q", "a ")}
    assert reason("hh_rlhf", row) == ("chosen equals rejected", 2)


@pytest.mark.parametrize(
    ("rejected", "message"),
    [
        (dialogue("q", "b", "q2", ""), "'rejected': an empty assistant turn"),
        (dialogue("r", "b"), "differ at turn 0; expected one prompt"),
        (dialogue("q", "b", "q2", "c"), "differ at turn 1; expected one prompt"),
        (dialogue("q", "a", "q2", "c"), "differ at turn 2; expected one prompt"),
        (dialogue("q"), "differ at turn 1; expected one prompt"),
        (dialogue("q", "b") + "\n\nAssistant: c", "'rejected': turn 2 (assistant): turns must alternate"),
        (dialogue("q", "b") + "\n\nHuman: q\n\nHuman: q", "'rejected': turn 3 (user): turns must alternate"),
        ("\n\nAssistant: a", "'rejected': turn 0 (assistant): turns must alternate"),
        ("q", "'rejected': expected '\\n\\nHuman: ' at the start, found 'q'"),
        ("x" + dialogue("q", "b"), "'rejected': expected '\\n\\nHuman: ' at the start"),
        (None, "'rejected': expected text, found nothing"),
    ],
)
def test_hh_rlhf_refuses(rejected: Any, message: str) -> None:
    """The glitches of the real data: nothing said, one speaker twice, dialogues that part early."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - compared as plain text below
        hh_rlhf({"chosen": dialogue("q", "a"), "rejected": rejected}, score=None)
    assert message in str(caught.value)


def test_hh_rlhf_refuses_dialogues_that_end_with_the_human() -> None:
    """Only the assistant's words are trained."""
    with pytest.raises(ValueError, match="'chosen': expected one assistant turn, found user"):
        hh_rlhf({"chosen": dialogue("q", "a", "x"), "rejected": dialogue("q", "a", "y")}, score=None)


# kto


@pytest.mark.parametrize(("label", "score"), [(True, 1.0), (False, 0.0)])
@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "completion": "a"},
        {"prompt": [turn("user", "q")], "completion": [turn("assistant", "a")]},
        {"prompt": "q", "completion": [turn("assistant", "a")], "messages": None},
        {"messages": [turn("user", "q"), turn("assistant", "a")], "prompt": None, "completion": None},
    ],
)
def test_kto_label_is_the_score_of_the_last_turn(row: Row, label: bool, score: float) -> None:
    """Text, turns and LLaMA-Factory's messages give the same example, with 1 or 0."""
    (example,) = kto({**row, "label": label}, score=0.123)
    assert example == Example((Message("user", "q"), Message("assistant", "a", score)), "binary")


def test_kto_earlier_answers_are_context() -> None:
    """The label is on the last turn alone."""
    turns = [turn("user", "q"), turn("assistant", "a"), turn("user", "q2"), turn("assistant", "a2")]
    (example,) = kto({"messages": turns, "label": True}, score=None)
    assert [m.score for m in example.messages] == [None, None, None, 1.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": None}, "'label': found null, expected true or false"),
        ({"label": 1}, "'label': found 1, expected true or false"),
        ({"label": "true"}, "'label': found 'true'"),
        ({"completion": ""}, "'completion' is empty"),
        ({"completion": None}, "'completion': expected text, found nothing"),
        ({"completion": [turn("user", "a")]}, "'completion': expected one assistant turn, found user"),
        ({"completion": [turn("assistant", "a")] * 2}, "expected one assistant turn, found assistant, assistant"),
        ({"prompt": [turn("user", "q"), turn("assistant", "a")]}, "'prompt' must end with the user's turn"),
        ({"messages": [turn("user", "q"), turn("assistant", "a")]}, "'completion' or 'messages', found both"),
        ({"messages": [turn("user", "q")], "completion": None}, "'messages': expected one assistant turn, found user"),
    ],
)
def test_kto_refuses(change: dict[str, Any], message: str) -> None:
    """The label is a boolean, for some data sets write -1; what it is on is one assistant turn."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - compared as plain text below
        kto({"prompt": "q", "completion": "a", "label": True} | change, score=None)
    assert message in str(caught.value)
