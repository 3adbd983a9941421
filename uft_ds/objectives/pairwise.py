"""Pairwise losses, functions of the difference between the chosen and the rejected response. One value per pair.

D = r_chosen - r_rejected, with r = beta * log_ratio. A term that depends only on the prompt cancels in it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor


@dataclass(frozen=True)
class Pairs:
    """Both sides of each pair, the chosen one in column 0.

    rewards_P2: [pairs, 2], beta * log_ratio (per token if lengths are normalised), or the values of a reward head;
        None without both.
    log_ratios_P2: [pairs, 2], nats, summed over tokens; None without a reference.
    logps_P2: [pairs, 2], log pi(y|x), nats, summed over tokens, float64; None with a reward head.
    tokens_P2, scores_P2: [pairs, 2], float32.
    beta: per nat, or per nat per token.
    """

    rewards_P2: Tensor | None
    log_ratios_P2: Tensor | None
    logps_P2: Tensor | None
    tokens_P2: Tensor
    scores_P2: Tensor
    beta: float


@dataclass(frozen=True)
class PairConstants:
    """Constants that some of the losses use.

    label_smoothing: assumed probability that a preference is reversed; for cdpo and robust.
    rpo_scale: eta, the factor of the difference of scores; for rpo_*.
    dpop_penalty: lambda; for dpop.
    simpo_margin: gamma; for simpo.
    score_margin: whether the difference of the given scores is a margin; for bradley_terry.
    centering: coefficient of (r_chosen + r_rejected)^2; for bradley_terry.
    """

    label_smoothing: float = 0.0
    rpo_scale: float = 1.0
    dpop_penalty: float = 50.0
    simpo_margin: float = 0.5
    score_margin: bool = False
    centering: float = 0.0


PairLoss = Callable[[Pairs, PairConstants], Tensor]


def dpo(pairs: Pairs, constants: PairConstants) -> Tensor:
    """-log sigmoid(D): DPO (arXiv 2305.18290) Eq. 7, which is UNA's pairwise form (2408.15339 Eq. 10)."""
    return -F.logsigmoid(_margins(pairs))


def cdpo(pairs: Pairs, constants: PairConstants) -> Tensor:
    """-(1 - e) log sigmoid(D) - e log sigmoid(-D): conservative DPO (Mitchell 2023); e is the label smoothing."""
    return smoothed(_margins(pairs), constants.label_smoothing)


def smoothed(margins_P: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy of sigmoid(D) with the label 1 - smoothing."""
    return -(1 - smoothing) * F.logsigmoid(margins_P) - smoothing * F.logsigmoid(-margins_P)


def robust(pairs: Pairs, constants: PairConstants) -> Tensor:
    """(-(1 - e) log sigmoid(D) + e log sigmoid(-D)) / (1 - 2 e): unbiased if labels are flipped (2403.00409)."""
    margins_P, e = _margins(pairs), constants.label_smoothing
    return (-(1 - e) * F.logsigmoid(margins_P) + e * F.logsigmoid(-margins_P)) / (1 - 2 * e)


def ipo(pairs: Pairs, constants: PairConstants) -> Tensor:
    """(d - 1 / (2 beta))^2, where d is the difference of log-ratios per token: IPO (2310.12036) Eq. 17.

    The authors' code computes it per token; the paper's formula does not mention lengths.
    """
    assert pairs.log_ratios_P2 is not None
    return (_difference(pairs.log_ratios_P2 / pairs.tokens_P2) - 1 / (2 * pairs.beta)).square()


def hinge(pairs: Pairs, constants: PairConstants) -> Tensor:
    """max(0, 1 - D): SLiC-HF (2305.10425), relative to the reference as in RSO (2309.06657)."""
    return torch.relu(1 - _margins(pairs))


def rpo_sq(pairs: Pairs, constants: PairConstants) -> Tensor:
    """(D - eta d)^2, where d is the difference of given scores: NVIDIA's reward-aware preference optimisation.

    arXiv 2502.00203.
    """
    return (_margins(pairs) - _score_margins(pairs, constants)).square()


def rpo_bwd(pairs: Pairs, constants: PairConstants) -> Tensor:
    """KL from Bernoulli(sigmoid(eta d)) to Bernoulli(sigmoid(D)): 2502.00203; equal to DPO for large eta d."""
    return _bernoulli_kl(_score_margins(pairs, constants), _margins(pairs))


def rpo_fwd(pairs: Pairs, constants: PairConstants) -> Tensor:
    """KL from Bernoulli(sigmoid(D)) to Bernoulli(sigmoid(eta d)): 2502.00203."""
    return _bernoulli_kl(_margins(pairs), _score_margins(pairs, constants))


def dpop(pairs: Pairs, constants: PairConstants) -> Tensor:
    """-log sigmoid(D - lambda max(0, -r_chosen)): DPO-Positive (2402.13228) penalises a falling chosen likelihood."""
    assert pairs.rewards_P2 is not None
    return -F.logsigmoid(_margins(pairs) - constants.dpop_penalty * torch.relu(-pairs.rewards_P2[:, 0]))


def simpo(pairs: Pairs, constants: PairConstants) -> Tensor:
    """-log sigmoid(beta d - gamma), where d is the difference of log pi per token: SimPO (2405.14734). No reference."""
    return -F.logsigmoid(pairs.beta * _difference(_logps(pairs) / pairs.tokens_P2) - constants.simpo_margin)


def contrast(pairs: Pairs, constants: PairConstants) -> Tensor:
    """-log sigmoid(beta d), where d is the difference of log pi: preference part of CPO (2401.08417) Eq. 3.

    No reference.
    """
    return -F.logsigmoid(pairs.beta * _difference(_logps(pairs)))


def odds_ratio(pairs: Pairs, constants: PairConstants) -> Tensor:
    """-log sigmoid(log odds_chosen - log odds_rejected), where odds = p / (1 - p) and log p is log pi per token.

    This is the preference part of ORPO (2403.07691) Eq. 7. It has no reference and no beta.
    """
    return -F.logsigmoid(_difference(log_odds(_logps(pairs) / pairs.tokens_P2)))


def bradley_terry(pairs: Pairs, constants: PairConstants) -> Tensor:
    """-log sigmoid(D - m) + c (r_chosen + r_rejected)^2, where r is what a reward head gives.

    m is the difference of the given scores (Llama 2, 2307.09288 Eq. 2), or 0. The term with c keeps rewards around 0,
    because D does not change if a number is added to all of them (2312.09244 Eq. 2).
    """
    assert pairs.rewards_P2 is not None
    margins_P = _margins(pairs) - (_difference(pairs.scores_P2) if constants.score_margin else 0.0)
    return -F.logsigmoid(margins_P) + constants.centering * pairs.rewards_P2.sum(dim=1).square()


def log_odds(logps: Tensor) -> Tensor:
    """log p - log(1 - p) from log p in nats; the tensor has any shape and a floating-point dtype."""
    # At probability 1 the odds would be infinite and their gradient NaN.
    logps = logps.clamp(max=-_LEAST_NATS)
    return logps - _log1mexp(logps)


PAIR_LOSSES: dict[str, PairLoss] = {
    "dpo": dpo,
    "cdpo": cdpo,
    "robust": robust,
    "ipo": ipo,
    "hinge": hinge,
    "rpo_sq": rpo_sq,
    "rpo_fwd": rpo_fwd,
    "rpo_bwd": rpo_bwd,
    "dpop": dpop,
    "simpo": simpo,
    "contrast": contrast,
    "odds_ratio": odds_ratio,
    "bradley_terry": bradley_terry,
}
"""The functions of the pairwise losses of `losses.py`, by name."""

_LEAST_NATS = 1e-6
"""Smallest -log p from which odds are computed."""


def _margins(pairs: Pairs) -> Tensor:
    assert pairs.rewards_P2 is not None
    return _difference(pairs.rewards_P2)


def _logps(pairs: Pairs) -> Tensor:
    assert pairs.logps_P2 is not None
    return pairs.logps_P2


def _score_margins(pairs: Pairs, constants: PairConstants) -> Tensor:
    return constants.rpo_scale * _difference(pairs.scores_P2)


def _difference(values_P2: Tensor) -> Tensor:
    return values_P2[:, 0] - values_P2[:, 1]


def _bernoulli_kl(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    """KL(Bernoulli(sigmoid(p)) || Bernoulli(sigmoid(q))), nats."""
    # logsigmoid instead of log(sigmoid) and log(1 - sigmoid), which are infinite for large logits.
    of_one = F.logsigmoid(logits_p) - F.logsigmoid(logits_q)
    of_zero = F.logsigmoid(-logits_p) - F.logsigmoid(-logits_q)
    return torch.sigmoid(logits_p) * of_one + torch.sigmoid(-logits_p) * of_zero


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, by the numerically stable one of two formulas; they meet at x = -log 2."""
    return torch.where(x > -0.6931, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))
