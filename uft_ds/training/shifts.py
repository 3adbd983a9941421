"""Forwards that a step's reward shift needs before the step itself: of mismatched pairs (`kl`) or repeated prompts.

`objectives/shifts.py` computes the shifts from their results.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

from torch import Tensor

from uft_ds.data.micro_batch import MicroBatch
from uft_ds.data.mixture import Step
from uft_ds.objectives.objective import log_ratios_of
from uft_ds.objectives.reference import POLICY_STREAM, REFERENCE_STREAM
from uft_ds.objectives.reward_shift import kl_shift
from uft_ds.objectives.shifts import (
    ResponseName,
    StepShift,
    mismatched_step,
    of_repeated_prompts,
    prompt_means,
    shifts_of,
)
from uft_ds.streams.stream import logps_of
from uft_ds.training.forwarding import Forwarded, Method, forward, streams_of


def shift_of_step(method: Method, step: Step, before: float) -> StepShift:
    """The step's shift. If it needs log-ratios, both streams are forwarded without gradient. Every rank must call it.

    Args:
        before: the shift state that the previous step returned, nats.
    """
    name = method.objective.shift.name
    if name == "kl":
        return StepShift(_kl_of(method, step))
    if name == "prompt_mean":
        # A response's shift depends on log-ratios of the whole step, but a micro-batch's backward cannot wait for later
        # micro-batches. So the responses are forwarded ahead.
        repeated = of_repeated_prompts(method.objective, step)
        with method.engine.evaluating():
            ahead = forward(method, repeated, with_statistics=False)
        method.known.learn(method.engine, repeated)  # before the step's micro-batches ask what is known
        return StepShift(before, means_of(method, step, ahead))
    return StepShift(before)


def shifts_on_device(method: Method, shift: StepShift, batches: Seq[MicroBatch]) -> list[Tensor | None]:
    """The shifts of each micro-batch on the engine's device: [responses], float32; None if there is no shift."""
    on_host = shifts_of(method.objective, shift, batches)
    return [None if shifts is None else shifts.to(method.engine.device, non_blocking=True) for shifts in on_host]


def means_of(method: Method, step: Step, forwarded: Seq[Forwarded]) -> dict[ResponseName, float]:
    """For `prompt_mean`, the mean log-ratio by response over all ranks, nats; for other shifts an empty dictionary.

    Args:
        forwarded: this rank's results; they must contain the responses to repeated prompts.
    """
    if method.objective.shift.name != "prompt_mean":
        return {}
    own: dict[ResponseName, float] = {}
    for part in forwarded:
        if REFERENCE_STREAM in part.logps:
            log_ratios_R = log_ratios_of(
                method.objective, part.batch, part.logps[POLICY_STREAM], part.logps[REFERENCE_STREAM]
            )
            names = zip(part.batch.response_keys, (r.kind for r in part.batch.responses), strict=True)
            own |= dict(zip(names, log_ratios_R.tolist(), strict=True))
    everyones = method.engine.gather_over_data(own)
    return prompt_means(method.objective, step, {name: ratio for of in everyones for name, ratio in of.items()})


def _kl_of(method: Method, step: Step) -> float:
    """KTO's reference point from mismatched prompts and responses of this step, nats."""
    joined = mismatched_step(method.objective, step)
    if not joined.sequences:
        return 0.0
    own: list[float] = []
    with method.engine.evaluating():
        for batch in method.engine.micro_batches(joined, method.tokens_per_micro_batch):
            logps = logps_of(method.engine(batch, streams_of(method.engine, with_reference=True)), batch)
            own += log_ratios_of(method.objective, batch, logps[POLICY_STREAM], logps[REFERENCE_STREAM]).tolist()
    # Sorted, so that the rounding of the sum does not depend on which rank held which response.
    return kl_shift(sorted(ratio for of_rank in method.engine.gather_over_data(own) for ratio in of_rank))
