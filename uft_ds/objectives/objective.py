"""From the log-probs of a micro-batch to its share of the step's loss.

A step's loss is a sum over the losses in use. Each contributes (sum of its weighted terms) / (number of its terms in
the whole step). Terms are responses, pairs or tokens. Their number is known on every rank before the first backward, so
the gradient does not depend on the world size or the packing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from typing import Literal, cast

import torch
from torch import Tensor

from uft_ds.data.example import KINDS, Kind, Response
from uft_ds.data.micro_batch import MicroBatch
from uft_ds.objectives.baselines import Baselines
from uft_ds.objectives.implicit_reward import implicit_reward
from uft_ds.objectives.likelihood import is_imitated, is_undesirable, sequence_nll
from uft_ds.objectives.losses import (
    A_TOKEN,
    LIKELIHOOD,
    LOSSES,
    NEEDS_PAIRS,
    NEEDS_REFERENCE,
    POINTWISE,
    POLICY_GRADIENT,
    TERMS,
    Distance,
    PolicyGradient,
)
from uft_ds.objectives.pairwise import PAIR_LOSSES, PairConstants, Pairs
from uft_ds.objectives.pointwise import pointwise_loss
from uft_ds.objectives.policy_gradient import policy_gradient_loss
from uft_ds.objectives.reference import POLICY_STREAM, REFERENCE_STREAM, REWARD_STREAM, RewardBy
from uft_ds.objectives.reward_shift import Center, RewardShift

BetaSchedule = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class KindObjective:
    """The objective of one kind of response: losses with their weights, a weight for all of them, and beta.

    beta: implicit reward per nat; of a policy gradient loss the price of a nat of KL, in the unit of scores.
    """

    losses: Mapping[str, float]
    weight: float = 1.0
    beta: float = 0.01


@dataclass(frozen=True)
class Objective:
    """The losses of each kind, and what they share.

    center: whether rewards and scores are compared with the means over the answers to the same prompt.
    length_normalized: log-ratios are means over a response's tokens, not sums; beta is then per nat per token.
    undesirable_weight: weight of binary responses labelled bad; good ones have weight 1.
    beta_schedule: how the factor of all betas changes over the steps. beta_end: the factor at the last step.
    reward: what the reward of a response is; that of a head needs no reference and has no beta.
    """

    of_kind: Mapping[Kind, KindObjective]
    shift: RewardShift = field(default_factory=RewardShift)
    center: Center = "none"
    length_normalized: bool = False
    undesirable_weight: float = 1.0
    beta_schedule: BetaSchedule = "constant"
    beta_end: float = 1.0
    constants: PairConstants = field(default_factory=PairConstants)
    reward: RewardBy = "implicit"

    @property
    def losses(self) -> tuple[str, ...]:
        """Names of all losses in use, in the order of the table."""
        used = {name for of in self.of_kind.values() for name in of.losses}
        return tuple(name for name in LOSSES if name in used)

    @property
    def needs_reference(self) -> bool:
        """Whether a loss in use compares with the reference; if not, no reference is computed."""
        return self.reward == "implicit" and any(name in NEEDS_REFERENCE for name in self.losses)

    @property
    def trained_stream(self) -> str:
        """The name of the one stream that a step trains."""
        return REWARD_STREAM if self.reward == "head" else POLICY_STREAM

    def weight_of(self, response: Response, loss: str) -> float:
        """The weight of one response's term of a loss."""
        of = self.of_kind[response.kind]
        labelled = self.undesirable_weight if is_undesirable(response) else 1.0
        return of.weight * of.losses[loss] * labelled

    def length_of(self, response: Response) -> float:
        """The divisor of a response's log-ratio: its number of tokens if its losses compare means, else 1."""
        return float(response.num_tokens) if self.compares_means(response.kind) else 1.0

    def compares_means(self, kind: Kind) -> bool:
        """Whether the kind's losses compare log-ratios per token, not sums."""
        return bool(self.length_normalized or A_TOKEN & self.of_kind[kind].losses.keys())

    def has_pointwise(self, kind: Kind) -> bool:
        """Whether this kind has a pointwise loss, whose implicit rewards are shifted."""
        return any(name in POINTWISE for name in self.of_kind[kind].losses)

    def centers(self, kind: Kind) -> bool:
        """Whether answers of this kind to one prompt are compared with each other.

        Instruction data is not: all its scores are 1, so two answers to one prompt would not be learned at all.
        """
        return self.center == "prompt" and kind != "instruction" and self.has_pointwise(kind)

    def policy_gradient(self, kind: Kind) -> PolicyGradient | None:
        """The policy gradient loss of this kind, which is then its only loss."""
        return next((name for name in POLICY_GRADIENT if name in self.of_kind[kind].losses), None)


def objective_at(objective: Objective, progress: float) -> Objective:
    """The objective at a point of the run: betas are multiplied by 1 at progress 0 and by `beta_end` at progress 1."""
    if objective.beta_schedule == "constant":
        return objective
    done = progress if objective.beta_schedule == "linear" else (1 - math.cos(math.pi * progress)) / 2
    factor = 1.0 + (objective.beta_end - 1.0) * done
    scaled = {kind: replace(of, beta=of.beta * factor) for kind, of in objective.of_kind.items()}
    return replace(objective, of_kind=scaled)


def count_terms(objective: Objective, responses: Iterable[Response]) -> dict[str, int]:
    """The number of terms of each loss in a whole step.

    Args:
        responses: in the step's order; the chosen response of a pair comes before the rejected one.
    """
    terms: Counter[str] = Counter(dict.fromkeys(objective.losses, 0))
    seen: set[int] = set()
    for response in responses:
        is_rejected = response.pair_id in seen
        if response.pair_id is not None:
            seen.add(response.pair_id)  # the next response with this number is the rejected one
        for name in objective.of_kind[response.kind].losses:
            terms[name] += _terms_of(name, response, is_rejected=is_rejected)
    return dict(terms)


def _terms_of(loss: str, response: Response, *, is_rejected: bool) -> int:
    if loss in NEEDS_PAIRS:
        return int(is_rejected)  # counts each pair once
    if loss in POLICY_GRADIENT:
        return int(response.is_online)
    if loss in LIKELIHOOD and not is_imitated(response, is_rejected=is_rejected):
        return 0
    return response.num_tokens if TERMS[loss] == "token" else 1


@dataclass(frozen=True)
class Rewards:
    """Log-ratios and rewards of a micro-batch: [responses] each, float32, with the trained stream's gradient.

    log_ratios_R: nats, summed over tokens; None with a reward head.
    rewards_R: beta * log-ratio (per token, if lengths are normalised), or the values of the head.
    """

    log_ratios_R: Tensor | None
    rewards_R: Tensor


def rewards_of(objective: Objective, micro_batch: MicroBatch, logps_R: Tensor, reference_logps_R: Tensor) -> Rewards:
    """Log-ratios and implicit rewards before any shift; rewards are in the unit of the kind's losses.

    Args:
        logps_R, reference_logps_R: [responses], nats, summed over tokens, float64.
    """
    # Subtracted in float64, then rounded: the difference is small compared with both sums.
    log_ratios_R = (logps_R - reference_logps_R).float()
    factors = [objective.of_kind[r.kind].beta / objective.length_of(r) for r in micro_batch.responses]
    return Rewards(log_ratios_R, implicit_reward(log_ratios_R, _on_device(factors, log_ratios_R.device)))


def log_ratios_of(objective: Objective, micro_batch: MicroBatch, logps_R: Tensor, reference_logps_R: Tensor) -> Tensor:
    """The log-ratios that betas multiply: [responses], float32, nats (per token if the kind's losses compare means)."""
    lengths = [objective.length_of(response) for response in micro_batch.responses]
    return (logps_R - reference_logps_R).float() / _on_device(lengths, logps_R.device)


def micro_batch_loss(
    objective: Objective,
    micro_batch: MicroBatch,
    num_terms: Mapping[str, int],
    logps: Mapping[str, Tensor],
    baselines: Baselines | None = None,
) -> tuple[Tensor, Tensor]:
    """The micro-batch's share of the step's loss, and the sums of each loss's terms for the metrics.

    Args:
        num_terms: the number of each loss's terms in the whole step.
        logps: by stream, [responses], nats, summed over tokens, float64: "policy" with gradient, and "reference" if the
            objective needs one. With a reward head instead "reward", its values, with gradient.
        baselines: what rewards are compared with; None: with the scores, without a shift.
    Returns:
        a scalar with gradient, also for a micro-batch without responses; and [2, kinds, losses], float64: the
        unweighted sum and the number of each loss's terms, which can be added over ranks and micro-batches.
    """
    trained_R = logps[objective.trained_stream]
    logps_R, reference_logps_R = logps.get(POLICY_STREAM), logps.get(REFERENCE_STREAM)
    rewards: Rewards | None = None
    if objective.reward == "head":
        rewards = Rewards(None, trained_R.float())
    elif reference_logps_R is not None:
        rewards = rewards_of(objective, micro_batch, trained_R, reference_logps_R)
    # Every rank must run a backward through the model, also if it has no term: the backward contains collectives.
    loss = trained_R.sum().float() * 0.0
    sums = torch.zeros(2, len(KINDS), len(LOSSES), dtype=torch.float64, device=trained_R.device)
    for name in objective.losses:
        places_M, terms_M = _terms(name, objective, micro_batch, logps_R, rewards, baselines)
        if not len(places_M):
            continue  # the whole step may have no such term, and `num_terms` may then be 0
        responses = [micro_batch.responses[place] for place in places_M]
        weights = [objective.weight_of(response, name) for response in responses]
        weights_M = _on_device(weights, terms_M.device)
        loss = loss + (weights_M * terms_M).sum() / num_terms[name]
        rows_M = _indices([KINDS.index(response.kind) for response in responses], terms_M.device)
        numbers = [response.num_tokens if TERMS[name] == "token" else 1 for response in responses]
        numbers_M = _on_device(numbers, terms_M.device).double()
        sums[0, :, LOSSES.index(name)].index_add_(0, rows_M, terms_M.detach().double())
        sums[1, :, LOSSES.index(name)].index_add_(0, rows_M, numbers_M)
    return loss, sums


def _terms(
    name: str,
    objective: Objective,
    micro_batch: MicroBatch,
    logps_R: Tensor | None,
    rewards: Rewards | None,
    baselines: Baselines | None,
) -> tuple[list[int], Tensor]:
    """The terms of one loss, and the index of the response that each belongs to (for a pair, the chosen one)."""
    device = micro_batch.scores_R.device
    if name in NEEDS_PAIRS:
        of_kind = [objective.of_kind[micro_batch.responses[chosen].kind] for chosen, _ in micro_batch.pairs]
        kept = [pair for pair, of in zip(micro_batch.pairs, of_kind, strict=True) if name in of.losses]
        if not kept:
            return [], micro_batch.scores_R[:0]
        index_P2 = _indices(kept, device)
        log_ratios_R = None if rewards is None else rewards.log_ratios_R
        pairs = Pairs(
            rewards_P2=None if rewards is None else rewards.rewards_R[index_P2],
            log_ratios_P2=None if log_ratios_R is None else log_ratios_R[index_P2],
            logps_P2=None if logps_R is None else logps_R[index_P2],
            tokens_P2=_on_device([r.num_tokens for r in micro_batch.responses], device)[index_P2],
            scores_P2=micro_batch.scores_R[index_P2],
            beta=objective.of_kind["pair"].beta,
        )
        return [chosen for chosen, _ in kept], PAIR_LOSSES[name](pairs, objective.constants).float()
    rejected = {rejected for _, rejected in micro_batch.pairs}
    members = [
        place
        for place, response in enumerate(micro_batch.responses)
        if name in objective.of_kind[response.kind].losses
        and (name not in LIKELIHOOD or is_imitated(response, is_rejected=place in rejected))
        and (name not in POLICY_GRADIENT or response.is_online)
    ]
    index_M = _indices(members, device)
    if name in LIKELIHOOD:
        assert logps_R is not None
        return members, sequence_nll(logps_R[index_M]).float()
    if name in POLICY_GRADIENT:
        if not members:
            return [], micro_batch.scores_R[:0]
        assert logps_R is not None
        assert baselines is not None, "an advantage compares a response with others, which the caller knows"
        return members, policy_gradient_loss(logps_R[index_M], baselines.advantages_R[index_M]).float()
    assert rewards is not None
    if baselines is None:
        return members, pointwise_loss(rewards.rewards_R[index_M], micro_batch.scores_R[index_M], cast(Distance, name))
    rewards_M = rewards.rewards_R[index_M] - baselines.shifts_R[index_M]
    return members, pointwise_loss(rewards_M, baselines.targets_R[index_M], cast(Distance, name))


def _on_device(values: Seq[float], device: torch.device) -> Tensor:
    """A float32 tensor, made on the host and copied: `torch.tensor(..., device=...)` would wait for the device."""
    return torch.tensor(values, dtype=torch.float32).to(device, non_blocking=True)


def _indices(values: Seq[int] | Seq[tuple[int, int]], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int64).to(device, non_blocking=True)
