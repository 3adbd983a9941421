"""Checks of steps that the policy's own answers make."""

from __future__ import annotations

import math

from uft_ds.data.mixture import Step
from uft_ds.errors import CheckFailed
from uft_ds.objectives.groups import Groups
from uft_ds.objectives.losses import OF_PROMPT, POINTWISE
from uft_ds.objectives.objective import Objective


def check_own_answers(objective: Objective, groups: Groups, step: Step) -> None:
    """Refuse a step with a response that a policy gradient loss cannot train on; every rank finds the same.

    Raises:
        CheckFailed: a response was not given by the policy, or has no other answer to be compared with. Both would
            otherwise be left out without a word.
    """
    for sequence in step.sequences:
        for response, key in zip(sequence.responses, sequence.response_keys, strict=True):
            loss = objective.policy_gradient(response.kind)
            if loss is None:
                continue
            where = f"objective.loss.{response.kind}: {loss}, step {step.index}: {response.origin}"
            if not response.is_online:
                raise CheckFailed(
                    f"{where} is not an answer of this step's policy, whose own answers alone this loss can train on; "
                    "take a pointwise loss, such as mse",
                    by_all=True,
                )
            if groups.number(objective, key, response) is None:
                others = "to its prompt" if loss in OF_PROMPT else "in the step"
                raise CheckFailed(
                    f"{where} is the only answer {others}, with nothing to be compared with; a prompt whose other "
                    "answers are missing must be left out whole",
                    by_all=True,
                )


def online_target_problem(mean_score: float, objective: Objective) -> str | None:
    """Why a policy that trains on its own answers cannot meet their scores; None if nothing is known against it.

    The mean log-ratio of answers that the policy itself gives is a KL divergence, which is never below 0. So with a
    pointwise loss the implicit scores of these answers are on average about that of a reward of 0, or higher, whatever
    is learned: lower scores push down every answer, for ever. Centred rewards and scores have no such bound.

    Args:
        mean_score: of the policy's own answers, before or after the first step.
    Raises:
        ValueError: `mean_score` is not in [0, 1].
    """
    if not 0.0 <= mean_score <= 1.0:
        raise ValueError(f"a mean score of {mean_score}: expected a number in [0, 1]")
    losses = objective.of_kind["score"].losses
    pointwise = [name for name in losses if name in POINTWISE]
    if not pointwise or objective.centers("score"):
        return None
    # The other shifts estimate the mean log-ratio itself, which leaves rewards around 0.
    reward = -objective.shift.value if objective.shift.name == "constant" else 0.0
    lowest = reward + 0.5 if pointwise == ["raw"] else 1 / (1 + math.exp(-reward))
    if mean_score >= lowest:
        return None
    return (
        f"objective.loss.score: {pointwise[0]} compares the policy's own answers with scores of {mean_score:.2f} on "
        f"average, which it cannot meet: their implicit scores are on average about {lowest:.2f} or higher, because "
        "the mean log-ratio of answers that the policy gives itself is a KL divergence. It would push down every "
        "answer, the best ones too. Take objective.center: prompt or rloo, or start from a model that scores higher"
    )
