"""What is told of a step's answers: its metrics, and the warnings after the first one."""

from __future__ import annotations

import pytest
from toy import objective

from uft_ds.rollouts.made import made_of, problems_at_the_start
from uft_ds.rollouts.record import Group, ScoredAnswer


def group(*scores: float, ended: bool = True, left_out: str = "", ids: tuple[int, ...] = (7, 2)) -> Group:
    answers = tuple(ScoredAnswer(ids, ended, "yes", score) for score in scores)
    return Group(0, 0, "p.jsonl:1", (1, 5), (), answers, left_out=left_out)


def made(*groups: Group) -> dict[str, float]:
    return made_of(groups, {"generation": 1.0, "scoring": 0.5}, 2.0, is_replayed=False)


def test_metrics_are_of_the_answers_that_are_trained_on() -> None:
    """A prompt that is left out is counted, and its answers change no other number."""
    found = made(group(0.0, 1.0), group(0.5, 0.5, ended=False, ids=(7, 8, 9, 9)), group(0.0, 0.0, left_out="late"))
    assert found["rollouts/prompts"] == 3
    assert found["rollouts/dropped"] == 1
    assert found["rollouts/score"] == 0.5
    assert found["rollouts/score_std"] == pytest.approx(0.125**0.5)
    assert found["rollouts/answer_tokens"] == 3
    assert found["rollouts/truncated"] == 0.5
    assert found["rollouts/distinct"] == 0.5
    assert (found["rollouts/generation_seconds"], found["rollouts/scoring_seconds"]) == (1.0, 0.5)


def test_a_start_that_can_learn_is_not_warned_of() -> None:
    """Answers that end, with several scores that a pointwise loss can meet."""
    assert list(problems_at_the_start(made(group(0.5, 1.0)), objective("mse"))) == []


def test_a_start_that_cannot_learn_is_warned_of() -> None:
    """Answers that are all cut, scores without a difference, scores below what implicit rewards can be."""
    cut = list(problems_at_the_start(made(group(0.5, 1.0, ended=False)), objective("mse")))
    assert len(cut) == 1
    assert "generator.max_new_tokens" in cut[0]
    (same,) = problems_at_the_start(made(group(0.75, 0.75)), objective("mse"))
    assert "have the score 0.75" in same
    (low,) = problems_at_the_start(made(group(0.0, 0.25)), objective("mse"))
    assert "scores of 0.12" in low
    assert list(problems_at_the_start(made(group(0.0, 0.25)), objective("mse", center="prompt"))) == []


def test_a_step_without_answers_is_no_ground_for_a_warning() -> None:
    assert list(problems_at_the_start(made(group(0.0, left_out="late")), objective("mse"))) == []
