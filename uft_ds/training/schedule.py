"""The learning rate as a function of the step."""

from __future__ import annotations

import math
from typing import Literal


def learning_rate(
    step: int, *, num_steps: int, peak: float, warmup: float, schedule: Literal["cosine", "linear", "constant"]
) -> float:
    """The learning rate of a step from 0 to num_steps - 1: a linear warm-up, then the schedule.

    A warm-up of w steps starts at peak / w and ends at peak. The cosine and linear schedules would reach 0 one step
    after the last one.

    Args:
        warmup: share of the steps, in [0, 1].
    """
    warmup_steps = round(warmup * num_steps)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    if schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (1 - progress) if schedule == "linear" else peak


def progress_of_step(step: int, num_steps: int) -> float:
    """The progress that schedules of beta take at a step from 0 to num_steps - 1: 0 at the first, 1 at the last."""
    return step / max(1, num_steps - 1)
