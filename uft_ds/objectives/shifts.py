"""The reward shift of each response of a step, computed from known log-ratios; nothing is forwarded here.

`reward_shift.py` defines the shifts, and `training/shifts.py` forwards the responses that they need.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from uft_ds.data.example import KINDS, Kind, Response, Sequence
from uft_ds.data.micro_batch import MicroBatch
from uft_ds.data.mixture import Step
from uft_ds.objectives.objective import Objective
from uft_ds.objectives.reward_shift import mismatched, next_running_mean, prompt_of, repeated_prompts

ResponseName = tuple[bytes, Kind]
"""A response by its content and its kind. The same content may occur in two kinds, which may have different betas."""


@dataclass(frozen=True)
class StepShift:
    """The shift estimate of one step.

    nats: for `ema` and `kl`, one estimate for all pointwise responses.
    means: for `prompt_mean`, nats by response; a response that is absent is not shifted.
    """

    nats: float = 0.0
    means: Mapping[ResponseName, float] = field(default_factory=dict)


def shifts_of(objective: Objective, shift: StepShift, batches: Iterable[MicroBatch]) -> list[Tensor | None]:
    """The shifts of each micro-batch's rewards: [responses], float32, on the host; None if there is no shift."""
    name = objective.shift.name
    if name == "none":
        return [None for _ in batches]

    def shift_of(key: bytes, response: Response) -> float:
        if not objective.has_pointwise(response.kind):
            return 0.0
        if name == "constant":
            return objective.shift.value
        # Unlike `constant`, these estimates are in nats; the response's beta converts them to the unit of rewards.
        nats = shift.means.get((key, response.kind), 0.0) if name == "prompt_mean" else shift.nats
        return objective.of_kind[response.kind].beta * nats

    return [
        torch.tensor(list(map(shift_of, batch.response_keys, batch.responses)), dtype=torch.float32)
        for batch in batches
    ]


def mismatched_step(objective: Objective, step: Step) -> Step:
    """The step's prompts joined with responses to other prompts, for `kl`; it may be empty."""
    return Step(step.index, mismatched([(sequence, response) for sequence, response, _ in _spans(objective, step)]))


def of_repeated_prompts(objective: Objective, step: Step) -> Step:
    """The units of a step that have a response to a repeated prompt, whose shift under `prompt_mean` is not 0."""
    repeated = _repeated(objective, step)
    kept = (
        unit
        for unit in step.units
        if any(prompt_of(sequence, response) in repeated for sequence in unit for response in sequence.responses)
    )
    return Step(step.index, tuple(sequence for unit in kept for sequence in unit))


def prompt_means(
    objective: Objective, step: Step, log_ratios: Mapping[ResponseName, float]
) -> dict[ResponseName, float]:
    """The mean log-ratio of the responses to each repeated prompt, by response, nats.

    Args:
        log_ratios: must contain the responses to repeated prompts.
    """
    repeated = _repeated(objective, step)
    members: dict[bytes, list[ResponseName]] = {}
    for sequence, response, key in _spans(objective, step):
        prompt = prompt_of(sequence, response)
        if prompt in repeated:
            members.setdefault(prompt, []).append((key, response.kind))
    means = {prompt: float(np.mean([log_ratios[name] for name in names])) for prompt, names in members.items()}
    return {name: means[prompt] for prompt, names in members.items() for name in names}


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


def _repeated(objective: Objective, step: Step) -> set[bytes]:
    spans = _spans(objective, step)
    prompts = [prompt_of(sequence, response) for sequence, response, _ in spans]
    return repeated_prompts(prompts, [key for *_, key in spans])


def _spans(objective: Objective, step: Step) -> Seq[tuple[Sequence, Response, bytes]]:
    """Each response with a pointwise loss, with its sequence and its key, in the order of the step."""
    return [
        (sequence, response, key)
        for sequence in step.sequences
        for response, key in zip(sequence.responses, sequence.response_keys, strict=True)
        if objective.has_pointwise(response.kind)
    ]
