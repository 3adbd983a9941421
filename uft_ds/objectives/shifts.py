"""The reward shift of each response of a step, once its log-ratios are known; nothing is forwarded here.

`reward_shift.py` says what the shifts are, `training/shifts.py` forwards what they need.
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
"""A response by its content and its kind: of two kinds, one content may have two betas."""


@dataclass(frozen=True)
class StepShift:
    """What the rewards of one step are moved by.

    nats: one estimate for all pointwise responses, for `ema` and `kl`.
    means: nats by response, for `prompt_mean`; a response that is absent is not moved.
    """

    nats: float = 0.0
    means: Mapping[ResponseName, float] = field(default_factory=dict)


def shifts_of(objective: Objective, shift: StepShift, batches: Iterable[MicroBatch]) -> list[Tensor | None]:
    """What is subtracted from the rewards of each micro-batch: [responses], float32, on the host; None: nothing."""
    name = objective.shift.name
    if name == "none":
        return [None for _ in batches]

    def shift_of(key: bytes, response: Response) -> float:
        if not objective.has_pointwise(response.kind):
            return 0.0
        if name == "constant":
            return objective.shift.value
        nats = shift.means.get((key, response.kind), 0.0) if name == "prompt_mean" else shift.nats
        return objective.of_kind[response.kind].beta * nats

    return [
        torch.tensor(list(map(shift_of, batch.response_keys, batch.responses)), dtype=torch.float32)
        for batch in batches
    ]


def mismatched_step(objective: Objective, step: Step) -> Step:
    """The step's prompts with other prompts' responses, for `kl`; maybe without any."""
    return Step(step.index, mismatched([(sequence, response) for sequence, response, _ in _spans(objective, step)]))


def of_repeated_prompts(objective: Objective, step: Step) -> Step:
    """The units whose shift is not 0 under `prompt_mean`."""
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
        log_ratios: of the responses to repeated prompts at least.
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
    """What the next step starts from, nats: the running mean, or this step's estimate.

    A number that is not finite is not kept: neither in the running mean nor for the held-out data.
    """
    if objective.shift.name != "ema":
        return shift.nats if math.isfinite(shift.nats) else before
    pointwise = rows[is_pointwise(objective, rows)]
    betas = np.array([objective.of_kind[kind].beta for kind in KINDS])
    log_ratios = np.sort(pointwise["reward"] / betas[pointwise["kind"]])
    if not len(log_ratios) or not np.isfinite(log_ratios).all():
        return shift.nats
    return next_running_mean(shift.nats, float(log_ratios.mean()), objective.shift.decay)


def is_pointwise(objective: Objective, rows: np.ndarray) -> np.ndarray:
    """Of a table of responses, those whose rewards the shift moves: [rows], bool."""
    return np.isin(rows["kind"], [code for code, kind in enumerate(KINDS) if objective.has_pointwise(kind)])


def _repeated(objective: Objective, step: Step) -> set[bytes]:
    spans = _spans(objective, step)
    prompts = [prompt_of(sequence, response) for sequence, response, _ in spans]
    return repeated_prompts(prompts, [key for *_, key in spans])


def _spans(objective: Objective, step: Step) -> Seq[tuple[Sequence, Response, bytes]]:
    """Each response that meets its score, with its sequence and its name, in the order of the step."""
    return [
        (sequence, response, key)
        for sequence in step.sequences
        for response, key in zip(sequence.responses, sequence.response_keys, strict=True)
        if objective.has_pointwise(response.kind)
    ]
