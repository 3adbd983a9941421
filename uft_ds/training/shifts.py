"""What a step's responses are compared with, and the forwards without a gradient that it may need before the step.

`kl` forwards mismatched pairs. Groups of responses are forwarded ahead only if the packing divides them: the mean of a
group that lies in one micro-batch is taken from the forward that trains. `objectives/shifts.py` does the arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq

from uft_ds.data.micro_batch import MicroBatch
from uft_ds.data.mixture import Step
from uft_ds.objectives.baselines import Compared
from uft_ds.objectives.groups import Groups, ResponseName, group_means, groups_of, units_of
from uft_ds.objectives.objective import log_ratios_of
from uft_ds.objectives.online import check_own_answers
from uft_ds.objectives.reference import POLICY_STREAM, REFERENCE_STREAM
from uft_ds.objectives.reward_shift import kl_shift
from uft_ds.objectives.shifts import StepShift, compared_with, mismatched_step
from uft_ds.streams.stream import logps_of
from uft_ds.training.forwarding import Forwarded, Method, forward, streams_of


def shift_of_step(method: Method, step: Step, batches: Seq[MicroBatch], before: float) -> StepShift:
    """What the step's responses are compared with beside their scores. Every rank must call it.

    Args:
        batches: this rank's micro-batches of the step.
        before: the shift state that the previous step returned, nats.
    Raises:
        CheckFailed: on every rank, if a policy gradient loss cannot train on a response of the step.
    """
    objective = method.objective
    groups = groups_of(objective, step)
    check_own_answers(objective, groups, step)
    nats = _kl_of(method, step) if objective.shift.name == "kl" else before
    if not groups.found:
        return StepShift(nats)
    # A response's baseline depends on its whole group, but a micro-batch's backward cannot wait for later micro-batches
    # or other ranks. All ranks must agree on which groups are divided, because the forward contains collectives.
    parts = method.engine.gather_over_data(groups.divided(objective, batches))
    divided: set[int] = set().union(*parts)
    if not divided:
        return StepShift(nats, groups)
    with method.engine.evaluating():
        ahead = forward(method, units_of(objective, groups, divided, step), with_statistics=False)
    return StepShift(nats, groups, means_of(method, groups, divided, step, ahead))


def means_of(
    method: Method, groups: Groups, chosen: Iterable[int], step: Step, forwarded: Seq[Forwarded]
) -> dict[int, float]:
    """The mean log-ratio of each chosen group over all ranks, nats, by its number. Every rank must call it.

    Args:
        forwarded: this rank's results; those of all ranks must contain the responses of these groups.
    """
    own: dict[ResponseName, float] = {}
    for part in forwarded:
        if REFERENCE_STREAM in part.logps:
            log_ratios_R = log_ratios_of(
                method.objective, part.batch, part.logps[POLICY_STREAM], part.logps[REFERENCE_STREAM]
            )
            names = zip(part.batch.response_keys, (r.kind for r in part.batch.responses), strict=True)
            own |= dict(zip(names, log_ratios_R.tolist(), strict=True))
    everyones = method.engine.gather_over_data(own)
    log_ratios = {name: ratio for of in everyones for name, ratio in of.items()}
    return group_means(method.objective, groups, set(chosen), step, log_ratios)


def compared_on_device(method: Method, shift: StepShift, batches: Seq[MicroBatch]) -> list[Compared | None]:
    """What the responses of each micro-batch are compared with, on the engine's device; None: with scores alone."""
    on_host = compared_with(method.objective, shift, batches)
    return [None if compared is None else compared.to(method.engine.device) for compared in on_host]


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
