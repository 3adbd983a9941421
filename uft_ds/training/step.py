"""One optimiser step over all ranks.

forward both streams -> log-ratios -> objective -> backward -> step      UFT (arXiv 2410.21438) Eq. 5-7
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from uft_ds.data.example import KINDS, SERVED
from uft_ds.data.micro_batch import MicroBatch
from uft_ds.data.mixture import Step
from uft_ds.data.own_answers import OwnAnswers
from uft_ds.engine.engine import StepResult
from uft_ds.objectives.baselines import Compared
from uft_ds.objectives.losses import LOSSES
from uft_ds.objectives.objective import count_terms, micro_batch_loss
from uft_ds.objectives.reference import POLICY_STREAM, REFERENCE_STREAM
from uft_ds.objectives.shifts import is_pointwise, next_shift
from uft_ds.record.metrics import group_metrics, step_metrics
from uft_ds.streams.stream import logps_of
from uft_ds.training.forwarding import Forwarded, Method, baselines_of, rows_of, with_known
from uft_ds.training.shifts import compared_on_device, shift_of_step

_POLICY_AND_REFERENCE = (POLICY_STREAM, REFERENCE_STREAM)


class StepOutcome(NamedTuple):
    """The outcome of a step.

    shift: state carried to the next step's reward shift, nats: the running mean, or this step's estimate.
    answers: of the step's policy; as for `StepSource.accept`.
    """

    result: StepResult
    metrics: dict[str, float]
    shift: float
    answers: OwnAnswers | None = None


def run_step(method: Method, step: Step, rate: float, before: float = 0.0) -> StepOutcome:
    """Run one optimiser step and compute its metrics over the responses of the whole step. Every rank must call it.

    Args:
        rate: the learning rate.
        before: the shift state that the previous step returned, nats.
    Raises:
        CheckFailed: on every rank, before anything has changed: a policy gradient loss cannot train on a response.
    """
    engine, objective, known = method.engine, method.objective, method.known
    num_terms = count_terms(objective, step.responses)
    computed = len(known.unknown(step).responses)
    micro_batches = method.micro_batches(step)
    batches = [batch for batch, _ in micro_batches]
    shift = shift_of_step(method, step, batches, before)
    compared = compared_on_device(method, shift, batches)
    total_loss = torch.zeros((), dtype=torch.float64, device=engine.device)
    sums = torch.zeros(2, len(KINDS), len(LOSSES), dtype=torch.float64, device=engine.device)
    done: list[Forwarded] = []
    for number, (of_micro_step, of_batch) in enumerate(zip(micro_batches, compared, strict=True), start=1):
        loss, parts, forwarded = micro_step(
            method, *of_micro_step, num_terms, of_batch, is_last=number == len(micro_batches)
        )
        total_loss += loss
        sums += parts
        done.append(forwarded)
    known.learn(engine, step)  # a collective, so every rank calls it at the same place
    result = engine.step(rate, total_loss)
    rows = np.concatenate(engine.gather_over_data(rows_of(objective, done)))
    metrics = step_metrics(objective, result.loss, engine.sum_over_ranks(sums), rows)
    metrics |= group_metrics(objective, shift.groups, rows)
    metrics |= {"grad_norm": result.grad_norm, "skipped": float(result.skipped), "reference/computed": float(computed)}
    moved = rows["shift"][is_pointwise(objective, rows)]
    if (objective.shift.name != "none" or objective.center != "none") and len(moved):
        metrics["reward_shift"] = float(moved.mean())
    after = before if result.skipped else next_shift(objective, rows, before, shift)
    return StepOutcome(result, metrics, after, _own_answers(method, step, done))


def _own_answers(method: Method, step: Step, done: Seq[Forwarded]) -> OwnAnswers | None:
    """Of all ranks. Every rank must call it."""
    if not any(response.is_online for response in step.responses):
        return None
    own: list[tuple[float, float, float, float]] = []
    for part in done:
        logps = [part.logps[stream].tolist() if stream in part.logps else None for stream in _POLICY_AND_REFERENCE]
        for number, response in enumerate(part.batch.responses):
            if response.is_online:
                policy, reference = (math.nan if of_R is None else of_R[number] for of_R in logps)
                own.append((policy, reference, response.facts.get(SERVED, math.nan), float(response.num_tokens)))
    rows = np.array([row for of_rank in method.engine.gather_over_data(own) for row in of_rank]).reshape(-1, 4)
    return OwnAnswers(*rows.T)


def micro_step(
    method: Method,
    batch: MicroBatch,
    forward_reference: bool,
    num_terms: Mapping[str, int],
    compared: Compared | None,
    *,
    is_last: bool,
) -> tuple[Tensor, Tensor, Forwarded]:
    """Forward and backward of one micro-batch. Nothing in here waits for the device: its queue must never run empty.

    Args:
        forward_reference: whether the reference is forwarded; else its stored log-probs are taken, if a loss needs any.
        num_terms: as for `micro_batch_loss`.
        compared: what the responses are compared with; None: with their scores alone.
        is_last: whether the gradient is complete after this micro-batch.
    Returns:
        the micro-batch's share of the step's loss, detached; its sums for the metrics; and its log-probs.
    """
    engine = method.engine
    outputs = engine(batch, method.streams(with_reference=forward_reference), with_statistics=True)
    live = logps_of(outputs, batch)
    logps = with_known(method, batch, live)
    baselines = baselines_of(method.objective, batch, logps, compared)
    loss, parts = micro_batch_loss(method.objective, batch, num_terms, logps, baselines)
    engine.backward(loss, is_last=is_last)
    trained = outputs[method.objective.trained_stream]
    forwarded = Forwarded.of(batch, logps, trained, method.rounding(live))
    return loss.detach(), parts, replace(forwarded, baselines=baselines)
