"""One optimiser step over all ranks.

forward both streams -> log-ratios -> objective -> backward -> step      UFT (arXiv 2410.21438) Eq. 5-7
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from uft_ds.data.example import KINDS, Response, Sequence
from uft_ds.data.micro_batch import MicroBatch
from uft_ds.data.mixture import Step
from uft_ds.errors import CheckFailed
from uft_ds.objectives.losses import LOSSES
from uft_ds.objectives.objective import Objective, count_terms, micro_batch_loss, rewards_of
from uft_ds.objectives.reward_shift import (
    kl_shift,
    mismatched,
    next_running_mean,
    prompt_means,
    prompt_of,
)
from uft_ds.training.engine import Engine, StepResult
from uft_ds.training.metrics import step_metrics
from uft_ds.training.reference_cache import ReferenceCache
from uft_ds.training.telemetry import response_rows


@dataclass(frozen=True)
class Forwarded:
    """The log-probs of a micro-batch without its graph: [responses] each, nats, float64."""

    batch: MicroBatch
    logps_R: Tensor
    reference_logps_R: Tensor | None


class StepOutcome(NamedTuple):
    """shift: the number that the reward shift goes on with: the running mean, or the last step's."""

    result: StepResult
    metrics: dict[str, float]
    shift: float


def run_step(
    engine: Engine,
    objective: Objective,
    step: Step,
    rate: float,
    tokens_per_micro_batch: int,
    reference: ReferenceCache,
    shift: float = 0.0,
) -> StepOutcome:
    """One optimiser step, and its metrics: over the responses of the whole step.

    Args:
        shift: what the step before went on with.
    """
    num_terms = count_terms(objective, step.responses)
    micro_batches = reference.micro_batches(engine, step, tokens_per_micro_batch)
    ahead: list[Forwarded] | None = None
    if objective.shift.name == "prompt_mean":
        # A response's shift depends on rewards of the whole step, which its backward must not wait for.
        with engine.evaluating():
            ahead = forward(engine, micro_batches, reference)
    elif objective.shift.name == "kl":
        shift = _kl_of(engine, objective, step, tokens_per_micro_batch)
    shifts = shifts_of(engine, objective, step, [batch for batch, _ in micro_batches], ahead, shift)
    total_loss = torch.zeros((), dtype=torch.float64, device=engine.device)
    sums = torch.zeros(2, len(KINDS), len(LOSSES), dtype=torch.float64, device=engine.device)
    done: list[Forwarded] = []
    for number, ((batch, forward_reference), shifts_R) in enumerate(zip(micro_batches, shifts, strict=True), start=1):
        if ahead is None:
            logps_R, forwarded_R = engine(batch, with_reference=forward_reference)
            reference_logps_R = reference.resolve(batch, forwarded_R)
        else:
            logps_R, _ = engine(batch, with_reference=False)
            reference_logps_R = ahead[number - 1].reference_logps_R
        loss, parts = micro_batch_loss(objective, batch, num_terms, logps_R, reference_logps_R, shifts_R)
        engine.backward(loss, is_last=number == len(micro_batches))
        total_loss += loss.detach()
        sums += parts
        done.append(Forwarded(batch, logps_R.detach(), reference_logps_R))
    computed = reference.learn(engine, step)
    result = engine.step(rate)
    mean_loss = float(engine.sum_over_ranks(total_loss))
    if not math.isfinite(mean_loss) and not result.skipped:
        raise CheckFailed(
            f"step {step.index + 1}: the loss is {mean_loss}, yet its gradient was finite and was applied"
        )
    rows = gathered_rows(engine, objective, done, shifts)
    metrics = step_metrics(objective, mean_loss, engine.sum_over_ranks(sums), rows)
    metrics |= {"grad_norm": result.grad_norm, "skipped": float(result.skipped), "reference/computed": float(computed)}
    if objective.shift.name != "none":
        metrics["reward_shift"] = float(rows["shift"].mean())
    return StepOutcome(result, metrics, _next_shift(objective, rows, shift))


def forward(engine: Engine, micro_batches: Seq[tuple[MicroBatch, bool]], reference: ReferenceCache) -> list[Forwarded]:
    """Log-probs of micro-batches, within `engine.evaluating()`."""
    done = []
    for batch, forward_reference in micro_batches:
        logps_R, forwarded_R = engine(batch, with_reference=forward_reference)
        done.append(Forwarded(batch, logps_R, reference.resolve(batch, forwarded_R)))
    return done


def shifts_of(
    engine: Engine,
    objective: Objective,
    step: Step,
    batches: Seq[MicroBatch],
    forwarded: Seq[Forwarded] | None,
    shift: float,
) -> list[Tensor | None]:
    """What is subtracted from the rewards of each micro-batch: [responses], float32; None: nothing.

    Args:
        forwarded: the same micro-batches' log-probs, for `prompt_mean`.
        shift: the number of this step, for `ema` and `kl`.
    """
    if objective.shift.name == "none":
        return [None for _ in batches]
    if objective.shift.name == "prompt_mean":
        assert forwarded is not None
        by_key = _prompt_shifts(engine, objective, step, forwarded)
        values = [[by_key[key] for key in batch.response_keys] for batch in batches]
    else:
        number = objective.shift.value if objective.shift.name == "constant" else shift
        values = [[number] * batch.num_responses for batch in batches]
    return [torch.tensor(of_batch, dtype=torch.float32, device=engine.device) for of_batch in values]


def gathered_rows(engine: Engine, objective: Objective, done: Seq[Forwarded], shifts: Seq[Tensor | None]) -> np.ndarray:
    """The table of all ranks' responses."""
    own = [
        response_rows(objective, part.batch, part.logps_R, part.reference_logps_R, shifts_R)
        for part, shifts_R in zip(done, shifts, strict=True)
    ]
    return np.concatenate(engine.gather_objects(np.concatenate(own)))


def _prompt_shifts(engine: Engine, objective: Objective, step: Step, forwarded: Seq[Forwarded]) -> dict[bytes, float]:
    """The shift of each response of the step, by its name."""
    own: dict[bytes, float] = {}
    for part in forwarded:
        assert part.reference_logps_R is not None
        rewards_R = rewards_of(objective, part.batch, part.logps_R, part.reference_logps_R).rewards_R
        own |= dict(zip(part.batch.response_keys, rewards_R.tolist(), strict=True))
    rewards = {key: reward for of_rank in engine.gather_objects(own) for key, reward in of_rank.items()}
    spans = list(_pointwise_spans(objective, step))
    names = [key for _, _, key in spans]
    prompts = [prompt_of(sequence, response) for sequence, response, _ in spans]
    shifts = dict(zip(names, prompt_means(prompts, [rewards[name] for name in names]), strict=True))
    return {key: shifts.get(key, 0.0) for sequence in step.sequences for key in sequence.response_keys}


def _kl_of(engine: Engine, objective: Objective, step: Step, tokens_per_micro_batch: int) -> float:
    """KTO's reference point: rewards of mismatched prompts and responses of this step, both streams, no gradient."""
    spans = [(sequence, response) for sequence, response, _ in _pointwise_spans(objective, step)]
    joined = Step(step.index, mismatched(spans, longest=tokens_per_micro_batch))
    if not joined.sequences:
        return 0.0
    own: list[float] = []
    with engine.evaluating():
        for batch in engine.micro_batches(joined, tokens_per_micro_batch):
            logps_R, reference_logps_R = engine(batch)
            assert reference_logps_R is not None
            own += rewards_of(objective, batch, logps_R, reference_logps_R).rewards_R.tolist()
    # Sorted, so that the sum does not depend on which rank held what.
    return kl_shift(sorted(reward for of_rank in engine.gather_objects(own) for reward in of_rank))


def _pointwise_spans(objective: Objective, step: Step) -> list[tuple[Sequence, Response, bytes]]:
    """Each response that meets its score, with its sequence and its name, in the order of the step."""
    return [
        (sequence, response, key)
        for sequence in step.sequences
        for response, key in zip(sequence.responses, sequence.response_keys, strict=True)
        if objective.has_pointwise(response.kind)
    ]


def _next_shift(objective: Objective, rows: np.ndarray, shift: float) -> float:
    if objective.shift.name != "ema":
        return shift
    pointwise = [code for code, kind in enumerate(KINDS) if objective.has_pointwise(kind)]
    rewards = np.sort(rows["reward"][np.isin(rows["kind"], pointwise)])
    if not len(rewards) or not np.isfinite(rewards).all():
        return shift
    return next_running_mean(shift, float(rewards.mean()), objective.shift.decay)
