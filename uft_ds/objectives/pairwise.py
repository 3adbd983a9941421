"""Pairwise losses: the chosen response against the rejected one, by their difference. One value a pair.

D is the difference of rewards, r_chosen - r_rejected with r = beta * log_ratio: what a prompt adds to both cancels.
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

    rewards_P2: [pairs, 2], beta * log_ratio (a token where lengths are normalised); None without a reference.
    log_ratios_P2: [pairs, 2], nats, summed over tokens; None without a reference.
    logps_P2: [pairs, 2], log pi(y|x), nats, summed over tokens, float64.
    tokens_P2, scores_P2: [pairs, 2], float32.
    beta: per nat, or per nat a token.
    """

    rewards_P2: Tensor | None
    log_ratios_P2: Tensor | None
    logps_P2: Tensor
    tokens_P2: Tensor
    scores_P2: Tensor
    beta: float


@dataclass(frozen=True)
class PairConstants:
    """What some of the losses take besides.

    label_smoothing: how likely a preference is the wrong way round; cdpo, robust.
    rpo_scale: eta, by which the difference of the scores is multiplied; rpo_*.
    dpop_penalty: lambda; dpop.
    simpo_margin: gamma; simpo.
    """

    label_smoothing: float = 0.0
    rpo_scale: float = 1.0
    dpop_penalty: float = 50.0
    simpo_margin: float = 0.5


PairLoss = Callable[[Pairs, PairConstants], Tensor]


def dpo(pairs: Pairs, constants: PairConstants) -> Tensor:
    """-log sigmoid(D): DPO (arXiv 2305.18290) Eq. 7, which is UNA's pairwise form (2408.15339 Eq. 10)."""
    return -F.logsigmoid(_margins(pairs))


def cdpo(pairs: Pairs, constants: PairConstants) -> Tensor:
    """-(1 - e) log sigmoid(D) - e log sigmoid(-D): conservative DPO (Mitchell 2023), e the label smoothing."""
    return smoothed(_margins(pairs), constants.label_smoothing)


def smoothed(margins_P: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy of sigmoid(D) with the label 1 - smoothing."""
    return -(1 - smoothing) * F.logsigmoid(margins_P) - smoothing * F.logsigmoid(-margins_P)


def robust(pairs: Pairs, constants: PairConstants) -> Tensor:
    """(-(1 - e) log sigmoid(D) + e log sigmoid(-D)) / (1 - 2 e): unbiased under flipped labels (2403.00409)."""
    margins_P, e = _margins(pairs), constants.label_smoothing
    return (-(1 - e) * F.logsigmoid(margins_P) + e * F.logsigmoid(-margins_P)) / (1 - 2 * e)


def ipo(pairs: Pairs, constants: PairConstants) -> Tensor:
    """(d - 1 / (2 beta))^2, d the difference of log-ratios a token: IPO (2310.12036) Eq. 17.

    A token, as its authors computed it; the paper's formula is silent on lengths.
    """
    assert pairs.log_ratios_P2 is not None
    return (_difference(pairs.log_ratios_P2 / pairs.tokens_P2) - 1 / (2 * pairs.beta)).square()


def hinge(pairs: Pairs, constants: PairConstants) -> Tensor:
    """max(0, 1 - D): SLiC-HF (2305.10425) with the reference's normalisation of RSO (2309.06657)."""
    return torch.relu(1 - _margins(pairs))


def rpo_sq(pairs: Pairs, constants: PairConstants) -> Tensor:
    """(D - eta d)^2, d the difference of the given scores: NVIDIA's reward-aware preference optimisation 2502.00203."""
    return (_margins(pairs) - _score_margins(pairs, constants)).square()


def rpo_bwd(pairs: Pairs, constants: PairConstants) -> Tensor:
    """KL from Bernoulli(sigmoid(eta d)) to Bernoulli(sigmoid(D)): 2502.00203; DPO where eta d is large."""
    return _bernoulli_kl(_score_margins(pairs, constants), _margins(pairs))


def rpo_fwd(pairs: Pairs, constants: PairConstants) -> Tensor:
    """KL from Bernoulli(sigmoid(D)) to Bernoulli(sigmoid(eta d)): 2502.00203."""
    return _bernoulli_kl(_margins(pairs), _score_margins(pairs, constants))


def dpop(pairs: Pairs, constants: PairConstants) -> Tensor:
    """-log sigmoid(D - lambda max(0, -r_chosen)): DPO-Positive (2402.13228), the chosen likelihood may not fall."""
    assert pairs.rewards_P2 is not None
    return -F.logsigmoid(_margins(pairs) - constants.dpop_penalty * torch.relu(-pairs.rewards_P2[:, 0]))


def simpo(pairs: Pairs, constants: PairConstants) -> Tensor:
    """-log sigmoid(beta d - gamma), d the difference of log pi a token: SimPO (2405.14734). No reference."""
    return -F.logsigmoid(pairs.beta * _difference(pairs.logps_P2 / pairs.tokens_P2) - constants.simpo_margin)


def contrast(pairs: Pairs, constants: PairConstants) -> Tensor:
    """-log sigmoid(beta d), d the difference of log pi: the preference part of CPO (2401.08417) Eq. 3. No reference."""
    return -F.logsigmoid(pairs.beta * _difference(pairs.logps_P2))


def odds_ratio(pairs: Pairs, constants: PairConstants) -> Tensor:
    """-log sigmoid(log odds_chosen - log odds_rejected), odds p / (1 - p), log p = log pi a token.

    The preference part of ORPO (2403.07691) Eq. 7. No reference, no beta.
    """
    return -F.logsigmoid(_difference(log_odds(pairs.logps_P2 / pairs.tokens_P2)))


def log_odds(logps: Tensor) -> Tensor:
    """log p - log(1 - p) of log-probs, nats: of any shape, floating point."""
    # At probability 1 the odds are infinite and their slope is not a number.
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
}
"""By name, those of `losses.py`."""

_LEAST_NATS = 1e-6


def _margins(pairs: Pairs) -> Tensor:
    assert pairs.rewards_P2 is not None
    return _difference(pairs.rewards_P2)


def _score_margins(pairs: Pairs, constants: PairConstants) -> Tensor:
    return constants.rpo_scale * _difference(pairs.scores_P2)


def _difference(values_P2: Tensor) -> Tensor:
    return values_P2[:, 0] - values_P2[:, 1]


def _bernoulli_kl(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    """KL(Bernoulli(sigmoid(p)) || Bernoulli(sigmoid(q))), nats."""
    of_one = F.logsigmoid(logits_p) - F.logsigmoid(logits_q)
    of_zero = F.logsigmoid(-logits_p) - F.logsigmoid(-logits_q)
    return torch.sigmoid(logits_p) * of_one + torch.sigmoid(-logits_p) * of_zero


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, in the stable one of its two forms."""
    return torch.where(x > -0.6931, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))
