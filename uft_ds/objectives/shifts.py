"""What each response of a step is compared with, from known log-ratios; nothing is forwarded here.

`reward_shift.py` defines the shifts, `groups.py` what a response is compared with beside its score, and
`training/shifts.py` forwards the responses that they need.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from uft_ds.data.example import KINDS, Response
from uft_ds.data.micro_batch import MicroBatch
from uft_ds.data.mixture import Step
from uft_ds.objectives.baselines import Compared
from uft_ds.objectives.groups import Group, Groups
from uft_ds.objectives.objective import Objective
from uft_ds.objectives.policy_gradient import advantage_of_score, kl_factor
from uft_ds.objectives.reward_shift import mismatched, next_running_mean


@dataclass(frozen=True)
class StepShift:
    """What the responses of one step are compared with beside their scores.

    nats: for the shifts `ema` and `kl`, one estimate for all pointwise responses.
    groups: of the step.
    means: nats, the mean log-ratio of each group that was forwarded ahead, by its number.
    """

    nats: float = 0.0
    groups: Groups = field(default_factory=Groups)
    means: Mapping[int, float] = field(default_factory=dict)


def compared_with(objective: Objective, shift: StepShift, batches: Iterable[MicroBatch]) -> list[Compared | None]:
    """What the responses of each micro-batch are compared with, on the host; None if with their scores alone.

    A group that was not forwarded ahead must lie wholly in one of the micro-batches.
    """
    if objective.shift.name == "none" and not shift.groups.found:
        return [None for _ in batches]
    return [_of_batch(objective, shift, batch) for batch in batches]


def _of_batch(objective: Objective, shift: StepShift, batch: MicroBatch) -> Compared:
    numbers = shift.groups.numbers_in(objective, batch)
    here = list(dict.fromkeys(i for i in numbers if i is not None and i not in shift.means))
    sizes = [shift.groups.found[i].num_responses for i in here]
    assert sizes == [numbers.count(i) for i in here], "the mean of a part of a group is no mean of the group"
    rows = [
        _of_response(objective, shift, response, None if number is None else shift.groups.found[number])
        for response, number in zip(batch.responses, numbers, strict=True)
    ]
    fixed, targets, of_scores, shift_factors, kl_factors = (
        torch.tensor([row[column] for row in rows], dtype=torch.float64) for column in range(5)
    )
    places = {number: place for place, number in enumerate(here)}
    ahead = [0.0 if number is None else shift.means.get(number, 0.0) for number in numbers]
    return Compared(
        shifts_R=fixed.float(),
        targets_R=targets.float(),
        of_scores_R=of_scores,
        shift_factors_R=shift_factors,
        kl_factors_R=kl_factors,
        group_of_R=torch.tensor([len(here) if i is None else places.get(i, len(here)) for i in numbers]).long(),
        sizes_G=torch.tensor([*sizes, 1], dtype=torch.float64),
        ahead_R=torch.tensor(ahead, dtype=torch.float64),
    )


def _of_response(
    objective: Objective, shift: StepShift, response: Response, group: Group | None
) -> tuple[float, float, float, float, float]:
    """(shift without the group's mean, target, advantage by scores, factor of the mean in the shift, of the KL)."""
    of, score = objective.of_kind[response.kind], response.score
    if group is None:
        return _fixed_shift(objective, shift.nats, response), score, math.nan, 0.0, 0.0
    loss = objective.policy_gradient(response.kind)
    if loss is not None:
        advantage = advantage_of_score(
            loss, score, mean_score=group.mean_score, score_std=group.score_std, num_answers=group.num_responses
        )
        return 0.0, score, advantage, 0.0, kl_factor(loss, of.beta, group.num_responses)
    if group.comparison == "shifted":
        return 0.0, score, math.nan, of.beta, 0.0
    above = score - group.mean_score
    return 0.0, 0.5 + above, above, of.beta, 0.0


def _fixed_shift(objective: Objective, nats: float, response: Response) -> float:
    """The shift of a response that is not a group's mean, in the unit of rewards."""
    name = objective.shift.name
    if name in ("none", "prompt_mean") or not objective.has_pointwise(response.kind):
        return 0.0
    # Unlike `constant`, the estimates are in nats; the response's beta converts them to the unit of rewards.
    return objective.shift.value if name == "constant" else objective.of_kind[response.kind].beta * nats


def mismatched_step(objective: Objective, step: Step) -> Step:
    """The step's prompts joined with responses to other prompts, for `kl`; it may be empty."""
    pointwise = [
        (sequence, response)
        for sequence in step.sequences
        for response in sequence.responses
        if objective.has_pointwise(response.kind)
    ]
    return Step(step.index, mismatched(pointwise))


def next_shift(objective: Objective, rows: np.ndarray, before: float, shift: StepShift) -> float:
    """The shift state for the next step, nats: the running mean, or this step's estimate.

    A value that is not finite is not kept, neither in the running mean nor for the held-out data.
    """
    if objective.shift.name != "ema":
        return shift.nats if math.isfinite(shift.nats) else before
    pointwise = rows[is_pointwise(objective, rows)]
    betas = np.array([objective.of_kind[kind].beta for kind in KINDS])
    # Sorted, so that the mean does not depend on which rank held which response.
    log_ratios = np.sort(pointwise["reward"] / betas[pointwise["kind"]])
    if not len(log_ratios) or not np.isfinite(log_ratios).all():
        return shift.nats
    return next_running_mean(shift.nats, float(log_ratios.mean()), objective.shift.decay)


def is_pointwise(objective: Objective, rows: np.ndarray) -> np.ndarray:
    """Whether the shift applies to each row of a table of responses: [rows], bool."""
    return np.isin(rows["kind"], [code for code, kind in enumerate(KINDS) if objective.has_pointwise(kind)])
