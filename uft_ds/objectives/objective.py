"""From the log-probs of a micro-batch to its share of the step's loss, and what is counted on the way.

A step's loss is the sum over the losses in use of: sum of weighted terms / number of that loss's terms in the
whole step. Terms are responses (pointwise) or tokens (nll). The number is known on every rank before the first
backward, so the gradient depends neither on the world size nor on how sequences were packed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from uft_ds.data.example import KINDS, Kind, Response
from uft_ds.data.micro_batch import MicroBatch
from uft_ds.objectives.implicit_reward import implicit_reward, implicit_score
from uft_ds.objectives.likelihood import sequence_nll
from uft_ds.objectives.pointwise import Distance, pointwise_loss

LIKELIHOOD_LOSSES = ("nll",)

SATURATED_BELOW = 0.01 * 0.25
"""sigma(r) (1 - sigma(r)) under 1% of its maximum: the squared error has no gradient left."""

FITTED_WITHIN = 0.1
"""A saturated response whose implicit score is this near its score is fitted, otherwise stuck."""

STATISTICS = (
    "responses",
    "tokens",
    "loss",
    "loss_terms",
    "implicit_reward",
    "implicit_score",
    "log_ratio",
    "saturated",
    "saturated_stuck",
)
"""Columns of the statistics: sums over the responses of one kind."""


@dataclass(frozen=True)
class Objective:
    """Which loss each kind of response has, its weight, and beta (per nat)."""

    loss_of_kind: Mapping[Kind, str]
    weight_of_kind: Mapping[Kind, float]
    beta: float

    @property
    def needs_reference(self) -> bool:
        """False for plain supervised fine-tuning: then no reference is computed at all."""
        return any(loss not in LIKELIHOOD_LOSSES for loss in self.loss_of_kind.values())

    def terms_of(self, response: Response) -> int:
        """How many terms of its loss one response contributes."""
        return response.num_tokens if self.loss_of_kind[response.kind] in LIKELIHOOD_LOSSES else 1


def count_terms(objective: Objective, responses: Iterable[Response]) -> dict[str, int]:
    """Number of terms of each loss over the responses of a whole step."""
    terms: Counter[str] = Counter()
    for response in responses:
        terms[objective.loss_of_kind[response.kind]] += objective.terms_of(response)
    return dict(terms)


def micro_batch_loss(
    objective: Objective,
    micro_batch: MicroBatch,
    num_terms: Mapping[str, int],
    logps_R: Tensor,
    reference_logps_R: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The micro-batch's share of the step's loss, and its statistics.

    Args:
        logps_R: [responses], policy, nats, summed over tokens, float64, with gradient.
        reference_logps_R: [responses], float64, or None where the objective needs none.
    Returns:
        a scalar with gradient, also for a micro-batch without responses; and [kinds, statistics], float64,
        sums that ranks and micro-batches may add up.
    """
    log_ratios_R = None if reference_logps_R is None else (logps_R - reference_logps_R).float()
    loss = logps_R.sum().float() * 0.0  # every rank needs a graph to walk back, whatever it holds
    loss_sums_R = torch.zeros(len(micro_batch.responses), device=logps_R.device)
    for name in sorted(set(objective.loss_of_kind.values())):
        members = [i for i, r in enumerate(micro_batch.responses) if objective.loss_of_kind[r.kind] == name]
        if not members:
            continue
        index_M = torch.tensor(members, device=logps_R.device)
        if name in LIKELIHOOD_LOSSES:
            sums_M = sequence_nll(logps_R[index_M]).float()
        else:
            assert log_ratios_R is not None
            scores_M = micro_batch.scores_R[index_M]
            distance = cast(Distance, name)
            sums_M = pointwise_loss(log_ratios_R[index_M], scores_M, beta=objective.beta, distance=distance)
        weights = [objective.weight_of_kind[micro_batch.responses[i].kind] for i in members]
        weights_M = torch.tensor(weights, dtype=torch.float32, device=sums_M.device)
        loss = loss + (weights_M * sums_M).sum() / num_terms[name]
        loss_sums_R = loss_sums_R.index_copy(0, index_M, sums_M.detach())
    with torch.no_grad():
        return loss, _statistics(objective, micro_batch, loss_sums_R, log_ratios_R)


def _statistics(objective: Objective, micro_batch: MicroBatch, loss_R: Tensor, log_ratios_R: Tensor | None) -> Tensor:
    responses = micro_batch.responses
    device = loss_R.device
    columns = {
        "responses": torch.ones_like(loss_R),
        "tokens": torch.tensor([float(r.num_tokens) for r in responses], device=device),
        "loss": loss_R,
        "loss_terms": torch.tensor([float(objective.terms_of(r)) for r in responses], device=device),
    }
    if log_ratios_R is not None:
        score_R = implicit_score(log_ratios_R, objective.beta)
        saturated_R = score_R * (1 - score_R) < SATURATED_BELOW
        far_R = (score_R - micro_batch.scores_R).abs() > FITTED_WITHIN
        columns |= {
            "implicit_reward": implicit_reward(log_ratios_R, objective.beta),
            "implicit_score": score_R,
            "log_ratio": log_ratios_R,
            "saturated": saturated_R.float(),
            "saturated_stuck": (saturated_R & far_R).float(),
        }
    sums = torch.zeros(len(KINDS), len(STATISTICS), dtype=torch.float64, device=device)
    kind_of_R = torch.tensor([KINDS.index(r.kind) for r in responses], dtype=torch.int64, device=device)
    for name, values_R in columns.items():
        sums[:, STATISTICS.index(name)].index_add_(0, kind_of_R, values_R.double())
    return sums
