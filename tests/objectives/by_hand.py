"""Responses whose log-probs a test gives by hand, and the loss of a step that holds them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from uft_ds.data.example import KINDS, ONLINE, Kind, Response, Sequence
from uft_ds.data.micro_batch import MicroBatch, micro_batch
from uft_ds.data.mixture import Step
from uft_ds.objectives.baselines import Baselines
from uft_ds.objectives.groups import group_means, groups_of
from uft_ds.objectives.objective import KindObjective, Objective, count_terms, log_ratios_of, micro_batch_loss
from uft_ds.objectives.shifts import StepShift, compared_with
from uft_ds.streams.stream import Output, logps_of

PROMPT_TOKENS = 3


def logistic(x: float) -> float:
    """1 / (1 + e^-x), in double precision, for any x."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def log_logistic(x: float) -> float:
    """log of it."""
    return -math.log1p(math.exp(-x)) if x >= 0 else x - math.log1p(math.exp(x))


def single(kind: Kind, score: float, num_tokens: int, *, pair_id: int | None = None, first: int = 0) -> Sequence:
    """A sequence with one response, after a prompt of three tokens; all count up from the first one."""
    end = PROMPT_TOKENS + num_tokens
    response = Response(PROMPT_TOKENS, end, score, kind, f"{kind}:{num_tokens}", pair_id)
    return Sequence(np.arange(first, first + end, dtype=np.int32), (response,))


def answer(score: float, *tokens: int, prompt: int = 0, kind: Kind = "score", online: bool = True) -> Sequence:
    """One answer of these tokens to a prompt, given by the policy or found in data."""
    token_ids = [prompt] * PROMPT_TOKENS + list(tokens)
    facts = {ONLINE: 1.0} if online else {}
    response = Response(PROMPT_TOKENS, len(token_ids), score, kind, f"{prompt}:{tokens}", other_facts=facts)
    return Sequence(np.array(token_ids, dtype=np.int32), (response,))


def pair(number: int, tokens: tuple[int, int] = (2, 3), scores: tuple[float, float] = (1.0, 0.0)) -> list[Sequence]:
    """Both sides of a pair, the chosen one first."""
    return [single("pair", score, size, pair_id=number) for score, size in zip(scores, tokens, strict=True)]


def of_kinds(losses: Mapping[Kind, Mapping[str, float]], *, beta: float = 0.1, **shared: Any) -> Objective:
    """The losses of some kinds; nll for the others."""
    return Objective({kind: KindObjective(losses.get(kind, {"nll": 1.0}), beta=beta) for kind in KINDS}, **shared)


def responses_of(sequences: Seq[Sequence]) -> list[Response]:
    """All of them, in order."""
    return [response for sequence in sequences for response in sequence.responses]


def shifted(batch: MicroBatch, shifts_R: Tensor | None) -> Baselines | None:
    """These shifts alone: targets are the scores, and there is no advantage."""
    return None if shifts_R is None else Baselines(shifts_R, batch.scores_R, torch.full_like(shifts_R, math.nan))


def share(
    objective: Objective,
    batch: MicroBatch,
    terms: Mapping[str, int],
    logps_N: Tensor,
    reference_N: Tensor | None,
    shifts_R: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`micro_batch_loss` from log-probs of tokens."""
    outputs = {"policy": Output(logps_N)}
    if reference_N is not None:
        outputs["reference"] = Output(reference_N)
    return micro_batch_loss(objective, batch, terms, logps_of(outputs, batch), shifted(batch, shifts_R))


def step_loss(
    objective: Objective,
    sequences: Seq[Sequence],
    logps_N: Tensor,
    reference_N: Tensor | None,
    shifts_R: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss and sums of a step that is one micro-batch."""
    terms = count_terms(objective, responses_of(sequences))
    return share(objective, micro_batch(sequences), terms, logps_N, reference_N, shifts_R)


class Compared(NamedTuple):
    """The loss of a step, and the target, the shift and the advantage of each response, in the order of the step."""

    loss: Tensor
    targets: list[float]
    shifts: list[float]
    advantages: list[float]


def compared_step(
    objective: Objective,
    sequences: Seq[Sequence],
    logps_R: Tensor,
    reference_R: Tensor,
    parts: Seq[Seq[int]] | None = None,
) -> Compared:
    """A step of one response a sequence, whose groups are compared as a step of training does it.

    logps_R, reference_R: [responses], float64, nats. parts: the sequences of each micro-batch; None: one holds all.
    """
    parts = [range(len(sequences))] if parts is None else parts
    step = Step(0, tuple(sequences))
    groups = groups_of(objective, step)
    batches = [micro_batch([sequences[i] for i in part]) for part in parts]
    whole = micro_batch(sequences)
    names = [(key, response.kind) for key, response in zip(whole.response_keys, whole.responses, strict=True)]
    ratios = log_ratios_of(objective, whole, logps_R.detach(), reference_R).tolist()
    means = group_means(
        objective, groups, groups.divided(objective, batches), step, dict(zip(names, ratios, strict=True))
    )
    terms = count_terms(objective, step.responses)
    loss = torch.zeros(())
    rows = {}
    for part, batch, compared in zip(
        parts, batches, compared_with(objective, StepShift(0.0, groups, means), batches), strict=True
    ):
        index_M = torch.tensor(list(part), dtype=torch.int64)
        logps = {"policy": logps_R[index_M], "reference": reference_R[index_M]}
        baselines = None
        if compared is not None:
            baselines = compared.with_log_ratios(log_ratios_of(objective, batch, logps["policy"], logps["reference"]))
            columns = (baselines.targets_R, baselines.shifts_R, baselines.advantages_R)
            rows |= dict(zip(part, zip(*(column_R.tolist() for column_R in columns), strict=True), strict=True))
        share_of_loss, _ = micro_batch_loss(objective, batch, terms, logps, baselines)
        loss = loss + share_of_loss
    in_order = [rows[i] for i in range(len(sequences)) if i in rows]
    targets, shifts, advantages = (list(column) for column in zip(*in_order, strict=True)) if rows else ([], [], [])
    return Compared(loss, targets, shifts, advantages)


def slope(function: Callable[[float], float], at: float, width: float = 1e-5) -> float:
    """Its derivative, by the difference of two values `width` to either side."""
    return (function(at + width) - function(at - width)) / (2 * width)
