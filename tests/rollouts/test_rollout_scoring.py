"""Scored groups: whole or left out with a reason, a failure is never a score, cut answers by the recipe's rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from uft_ds.data.example import Message
from uft_ds.errors import UserError
from uft_ds.recipe.settings import ScorerSettings
from uft_ds.rollouts.answers import Answer, Question, Unanswered
from uft_ds.rollouts.prompts import PromptText
from uft_ds.rollouts.record import Group
from uft_ds.rollouts.scorers import SourceScorer
from uft_ds.rollouts.scoring import StepScoring, Truncated

TEXTS = {
    "a.jsonl:1": PromptText((Message("user", "2 + 2"),), (), {}),
    "a.jsonl:2": PromptText((Message("user", "q"),), (), {}),
}
PROMPTS = [(0, 0, "a.jsonl:1"), (0, 1, "a.jsonl:2")]
QUESTIONS = [Question((1, 2), 2, 5), Question((3,), 2, 6)]
FOUR, FIVE, CUT = Answer((4, 0), True, (-0.5, -0.25)), Answer((5, 0), True), Answer((4, 4), False)


def decode(ids: Sequence[int]) -> str:
    return " ".join(str(token) for token in ids if token)


def judged(answers: list[Any], truncated: Truncated = "score", by: str = "regex:4", **more: Any) -> tuple[Group, ...]:
    scorer = SourceScorer(ScorerSettings(by, more.pop("rule", None), 10.0, 1, None), "data.sources.0.score_by")
    scoring = StepScoring({0: scorer}, {0: TEXTS}, decode, truncated, "hash")
    try:
        return scoring.scored(PROMPTS, QUESTIONS, answers)
    finally:
        scoring.close()


def test_each_answer_gets_its_own_score() -> None:
    """With its tokens, its text and what the generator said of it."""
    first, second = judged([(FOUR, FIVE), (FIVE, FIVE)])
    assert [answer.score for answer in first.answers] == [1.0, 0.0]
    assert [answer.score for answer in second.answers] == [0.0, 0.0]
    assert (first.answers[0].ids, first.answers[0].text, first.answers[0].logp) == ((4, 0), "4", -0.75)
    assert first.answers[1].logp is None
    assert first.messages == ({"role": "user", "content": "2 + 2"},)
    assert first.answers[0].seed == QUESTIONS[0].seeds[0] != first.answers[1].seed
    assert not first.left_out
    assert not second.left_out


def test_a_prompt_without_all_its_answers_is_left_out() -> None:
    """The others are not: and never is a missing answer a score of 0."""
    first, second = judged([Unanswered("timed out twice"), (FOUR, FIVE)])
    assert (first.left_out, first.answers) == ("timed out twice", ())
    assert [answer.score for answer in second.answers] == [1.0, 0.0]


def test_an_answer_that_cannot_be_scored_costs_its_group() -> None:
    """A length of 1 is outside of the map, which is a failure and not a clipped score."""
    first, second = judged([(FOUR, FIVE), (Answer((4, 4, 4, 0), True), FOUR)], by="length", rule="affine:0,3")
    assert not first.left_out
    assert second.answers[0].score is None
    assert second.answers[0].raw == 5.0
    assert "an answer has no score (the raw score 5 is not from 0 to 3" in second.left_out


@pytest.mark.parametrize(("truncated", "scores"), [("score", [1.0, 1.0]), ("zero", [0.0, 1.0])])
def test_cut_answers_follow_the_recipe(truncated: Truncated, scores: list[float]) -> None:
    """`score`: as it is; `zero`: its score is 0, and the record says so."""
    group, _ = judged([(CUT, FOUR), (FIVE, FIVE)], truncated)
    assert [answer.score for answer in group.answers] == scores
    assert [answer.ended for answer in group.answers] == [False, True]
    assert ("truncated: zero" in group.answers[0].reason) == (truncated == "zero")


def test_cut_answers_can_drop_their_prompt() -> None:
    """Its answers are in the record all the same, without a score."""
    group, other = judged([(CUT, FOUR), (FIVE, FIVE)], "drop")
    assert "1 of 2 answers are cut" in group.left_out
    assert [answer.ids for answer in group.answers] == [(4, 4), (4, 0)]
    assert not other.left_out


def test_a_scorer_that_cannot_be_made_names_its_key() -> None:
    """Before the launch."""
    with pytest.raises(
        UserError, match=r"^data\.sources\.3\.score_by: code:nowhere:f|^data\.sources\.3\.score_by: .*no module"
    ):
        SourceScorer(ScorerSettings("code:no_such_module_at_all:f", None, 10.0, 1, None), "data.sources.3.score_by")
    with pytest.raises(UserError, match=r"^data\.sources\.3\.score_by: .*expected"):
        SourceScorer(ScorerSettings("magic", None, 10.0, 1, None), "data.sources.3.score_by")
