"""Responses whose log-probs a test gives by hand, and the loss of a step that holds them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from typing import Any

import numpy as np
from torch import Tensor

from uft_ds.data.example import KINDS, Kind, Response, Sequence
from uft_ds.data.micro_batch import MicroBatch, micro_batch
from uft_ds.objectives.objective import KindObjective, Objective, count_terms, micro_batch_loss
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


def pair(number: int, tokens: tuple[int, int] = (2, 3), scores: tuple[float, float] = (1.0, 0.0)) -> list[Sequence]:
    """Both sides of a pair, the chosen one first."""
    return [single("pair", score, size, pair_id=number) for score, size in zip(scores, tokens, strict=True)]


def of_kinds(losses: Mapping[Kind, Mapping[str, float]], *, beta: float = 0.1, **shared: Any) -> Objective:
    """The losses of some kinds; nll for the others."""
    return Objective({kind: KindObjective(losses.get(kind, {"nll": 1.0}), beta=beta) for kind in KINDS}, **shared)


def responses_of(sequences: Seq[Sequence]) -> list[Response]:
    """All of them, in order."""
    return [response for sequence in sequences for response in sequence.responses]


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
    return micro_batch_loss(objective, batch, terms, logps_of(outputs, batch), shifts_R)


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


def slope(function: Callable[[float], float], at: float, width: float = 1e-5) -> float:
    """Its derivative, by the difference of two values `width` to either side."""
    return (function(at + width) - function(at - width)) / (2 * width)
