"""The learning rate as a function of the step."""

from __future__ import annotations

import math
from typing import Literal


def learning_rate(
    step: int, *, num_steps: int, peak: float, warmup: float, schedule: Literal["cosine", "linear", "constant"]
) -> float:
    """The rate of step 0 .. num_steps - 1: a linear rise over `warmup` of the steps, then the schedule.

    The first step of a warm-up of w steps runs at peak / w, its last at peak; cosine and linear would reach 0 one
    step past the end.
    """
    warmup_steps = round(warmup * num_steps)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    if schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (1 - progress) if schedule == "linear" else peak
