"""Metrics of how an online step was made."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from statistics import fmean, pstdev

from uft_ds.objectives.objective import Objective
from uft_ds.objectives.online import online_target_problem
from uft_ds.rollouts.record import Group, ScoredAnswer


def made_of(
    groups: Seq[Group], recorded_seconds: Mapping[str, float], seconds: float, *, is_replayed: bool
) -> dict[str, float]:
    """Metrics of the answers that a step trains on, and of the time that they took.

        rollouts/prompts, rollouts/dropped    prompts of the step; those that are left out
        rollouts/score, rollouts/score_std    mean and standard deviation of the scores
        rollouts/answer_tokens                mean length of an answer, in tokens
        rollouts/tokens_per_second            tokens of answers in a second of generation, as recorded
        rollouts/truncated                    share of the answers that were cut at the longest length
        rollouts/distinct                     mean share of a prompt's answers that differ from each other
        rollouts/seconds                      of this step, before its training
        rollouts/generation_seconds, rollouts/scoring_seconds    as recorded
        rollouts/replayed                     1 if the step was read from a record, else 0

    Args:
        seconds: that this start of the run took for the step.
    """
    used = [group for group in groups if not group.left_out]
    answers = [answer for group in used for answer in group.answers]
    made = {
        "rollouts/prompts": float(len(groups)),
        "rollouts/dropped": float(len(groups) - len(used)),
        "rollouts/seconds": seconds,
        "rollouts/replayed": float(is_replayed),
        **{f"rollouts/{name}_seconds": value for name, value in recorded_seconds.items()},
    }
    if answers:
        scores = [answer.score for answer in answers if answer.score is not None]
        made |= {
            "rollouts/score": fmean(scores),
            "rollouts/score_std": pstdev(scores),
            "rollouts/tokens_per_second": _per_second(answers, recorded_seconds),
            "rollouts/answer_tokens": fmean(len(answer.ids) for answer in answers),
            "rollouts/truncated": fmean(not answer.ended for answer in answers),
            "rollouts/distinct": fmean(len({a.ids for a in group.answers}) / len(group.answers) for group in used),
        }
    return made


def _per_second(answers: Seq[ScoredAnswer], recorded_seconds: Mapping[str, float]) -> float:
    seconds = recorded_seconds.get("generation", 0.0)
    return sum(len(answer.ids) for answer in answers) / seconds if seconds else math.nan


def problems_at_the_start(made: Mapping[str, float], objective: Objective) -> Iterator[str]:
    """What a user should know after the first answers, because the run would go on and learn little or the wrong thing.

    Args:
        made: as by `made_of`.
    """
    if "rollouts/score" not in made:
        return
    if made["rollouts/truncated"] == 1.0:
        yield (
            "none of this step's answers has ended by itself: all are cut at generator.max_new_tokens, where the "
            "policy learns nothing of how to end. Raise it, or start from a model that answers in turns (start.adapter)"
        )
    if made["rollouts/score_std"] == 0.0:
        yield (
            f"all of this step's answers have the score {made['rollouts/score']:.3g}: there is nothing in which a "
            "better one differs. Check the scorer, and read the answers in rollouts/answers"
        )
    problem = online_target_problem(made["rollouts/score"], objective)
    if problem is not None:
        yield problem
