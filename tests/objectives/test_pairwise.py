"""Losses of pairs against formulas written out in float64, what they become in limits, and how far they stay finite."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from by_hand import log_logistic, logistic, slope

from uft_ds.objectives.losses import NEEDS_PAIRS, OF_HEAD, PAIRWISE, REFERENCE_FREE
from uft_ds.objectives.pairwise import PAIR_LOSSES, PairConstants, Pairs

CONSTANTS = PairConstants(
    label_smoothing=0.2, rpo_scale=3.0, dpop_penalty=5.0, simpo_margin=0.7, score_margin=True, centering=0.03
)
NAMES = sorted(PAIR_LOSSES)


class Case(NamedTuple):
    """One pair: log-probs of both responses under both streams, nats; their tokens and scores; beta."""

    chosen: float
    rejected: float
    reference_chosen: float
    reference_rejected: float
    chosen_tokens: int = 4
    rejected_tokens: int = 7
    chosen_score: float = 1.0
    rejected_score: float = 0.0
    beta: float = 0.1

    @property
    def reward_chosen(self) -> float:
        return self.beta * (self.chosen - self.reference_chosen)

    @property
    def margin(self) -> float:
        return self.reward_chosen - self.beta * (self.rejected - self.reference_rejected)

    @property
    def target(self) -> float:
        return CONSTANTS.rpo_scale * (self.chosen_score - self.rejected_score)


def bernoulli_kl(p: float, q: float) -> float:
    """KL of Bernoulli(p) to Bernoulli(q)."""
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def log_odds(logp: float, tokens: int) -> float:
    """log(p / (1 - p)) of p = exp(log-prob a token)."""
    probability = math.exp(logp / tokens)
    return math.log(probability / (1 - probability))


def ipo_by_hand(c: Case) -> float:
    chosen = (c.chosen - c.reference_chosen) / c.chosen_tokens
    rejected = (c.rejected - c.reference_rejected) / c.rejected_tokens
    return (chosen - rejected - 1 / (2 * c.beta)) ** 2


def robust_by_hand(c: Case) -> float:
    right, wrong = -log_logistic(c.margin), -log_logistic(-c.margin)
    return (0.8 * right - 0.2 * wrong) / 0.6


BY_HAND: dict[str, Callable[[Case], float]] = {
    "dpo": lambda c: -math.log(logistic(c.margin)),
    "cdpo": lambda c: -0.8 * math.log(logistic(c.margin)) - 0.2 * math.log(1 - logistic(c.margin)),
    "robust": robust_by_hand,
    "ipo": ipo_by_hand,
    "hinge": lambda c: max(0.0, 1 - c.margin),
    "rpo_sq": lambda c: (c.margin - c.target) ** 2,
    "rpo_bwd": lambda c: bernoulli_kl(logistic(c.target), logistic(c.margin)),
    "rpo_fwd": lambda c: bernoulli_kl(logistic(c.margin), logistic(c.target)),
    "dpop": lambda c: -log_logistic(c.margin - 5.0 * max(0.0, -c.reward_chosen)),
    "simpo": lambda c: (
        -log_logistic(c.beta * c.chosen / c.chosen_tokens - c.beta * c.rejected / c.rejected_tokens - 0.7)
    ),
    "contrast": lambda c: -log_logistic(c.beta * (c.chosen - c.rejected)),
    "odds_ratio": lambda c: (
        -log_logistic(log_odds(c.chosen, c.chosen_tokens) - log_odds(c.rejected, c.rejected_tokens))
    ),
    # The rewards of these cases stand for a head's.
    "bradley_terry": lambda c: (
        -log_logistic(c.margin - (c.chosen_score - c.rejected_score)) + 0.03 * (2 * c.reward_chosen - c.margin) ** 2
    ),
}
"""With the constants above."""

START = Case(-9.0, -14.0, -9.0, -14.0)
"""Before the first step: dpop has its kink there."""

CASES = [
    Case(-8.9, -14.0, -9.0, -14.0),
    Case(-3.0, -20.0, -9.0, -14.0),
    Case(-13.0, -5.0, -9.0, -14.0),
    Case(-9.5, -30.0, -8.0, -12.5, 1, 30, 0.9, 0.35, 0.5),
    Case(-40.0, -45.0, -38.0, -49.0, 25, 3, 0.6, 0.6, 0.01),
    Case(-40.0, -2.5, -28.0, -9.0, 60, 5, 0.8, 0.1, 1.0),
    Case(-0.3, -0.2, -0.9, -0.1, 8, 8, 0.2, 0.7, 2.0),
]
"""Near the reference, better, worse; one token against many; equal scores; a score that contradicts; low perplexity."""


def pairs_of(case: Case, dtype: torch.dtype = torch.float64, *, reference: bool = True) -> tuple[torch.Tensor, Pairs]:
    """The policy's log-probs, [1, 2], float64, with gradient, and the pair as a loss gets it; rewards in `dtype`."""
    logps_P2 = torch.tensor([[case.chosen, case.rejected]], dtype=torch.float64, requires_grad=True)
    reference_P2 = torch.tensor([[case.reference_chosen, case.reference_rejected]], dtype=torch.float64)
    log_ratios_P2 = (logps_P2 - reference_P2).to(dtype)
    pairs = Pairs(
        rewards_P2=case.beta * log_ratios_P2 if reference else None,
        log_ratios_P2=log_ratios_P2 if reference else None,
        logps_P2=logps_P2,
        tokens_P2=torch.tensor([[float(case.chosen_tokens), float(case.rejected_tokens)]]),
        scores_P2=torch.tensor([[case.chosen_score, case.rejected_score]], dtype=dtype),
        beta=case.beta,
    )
    return logps_P2, pairs


def value_and_slopes(
    name: str, case: Case, constants: PairConstants = CONSTANTS, dtype: torch.dtype = torch.float64
) -> tuple[float, float, float]:
    """A loss of one pair, and its slopes by the log-probs of the chosen and of the rejected response."""
    logps_P2, pairs = pairs_of(case, dtype)
    loss_P = PAIR_LOSSES[name](pairs, constants)
    assert loss_P.shape == (1,)
    loss_P.sum().backward()
    assert logps_P2.grad is not None
    chosen, rejected = logps_P2.grad[0].tolist()
    return loss_P.item(), chosen, rejected


# ---- formulas


def test_every_loss_of_pairs_has_its_function() -> None:
    """The table's names, the functions, and the formulas of these tests are the same thirteen."""
    assert set(PAIR_LOSSES) == NEEDS_PAIRS == {*PAIRWISE, *REFERENCE_FREE, *OF_HEAD}
    assert set(BY_HAND) == NEEDS_PAIRS
    assert len(PAIR_LOSSES) == len(PAIRWISE) + len(REFERENCE_FREE) + len(OF_HEAD) == 13


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", CASES)
def test_losses_of_pairs_equal_their_formulas(name: str, case: Case) -> None:
    """In float64 the value is the formula's to 1e-9, both slopes are its differences' to 1e-6.

    The formula's width is 1e-5 nats, so that its difference is good to about 1e-9.
    """
    by_hand = BY_HAND[name]
    value, chosen, rejected = value_and_slopes(name, case)
    assert value == pytest.approx(by_hand(case), rel=1e-9, abs=1e-9)
    assert chosen == pytest.approx(slope(lambda x: by_hand(case._replace(chosen=x)), case.chosen), rel=1e-6, abs=1e-8)
    expected = slope(lambda x: by_hand(case._replace(rejected=x)), case.rejected)
    assert rejected == pytest.approx(expected, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", CASES)
def test_losses_of_pairs_in_float32(name: str, case: Case) -> None:
    """As in training, rewards in float32: within 2e-6 of the float64 formula, and of its own slope in float64."""
    value, *slopes = value_and_slopes(name, case, dtype=torch.float32)
    _, *exact = value_and_slopes(name, case)
    assert value == pytest.approx(BY_HAND[name](case), rel=2e-6, abs=2e-6)
    assert slopes == pytest.approx(exact, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_pairs_do_not_touch_each_other(name: str) -> None:
    """Several pairs at once: one value a pair, each as if it were alone."""
    cases = [case._replace(beta=0.1) for case in CASES]
    alone = [pairs_of(case)[1] for case in cases]
    fields = ("rewards_P2", "log_ratios_P2", "logps_P2", "tokens_P2", "scores_P2")
    tensors: dict[str, Any] = {field: torch.cat([getattr(pairs, field) for pairs in alone]) for field in fields}
    together = Pairs(**tensors, beta=0.1)
    found = PAIR_LOSSES[name](together, CONSTANTS).tolist()
    assert found == pytest.approx([BY_HAND[name](case) for case in cases], rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("name", REFERENCE_FREE)
def test_three_losses_need_no_reference(name: str) -> None:
    """Without log-ratios they give the same; whatever the reference says."""
    for case in CASES:
        _, pairs = pairs_of(case, reference=False)
        assert PAIR_LOSSES[name](pairs, CONSTANTS).item() == value_and_slopes(name, case)[0]


def test_constants_of_the_papers() -> None:
    """RPO's eta 1, DPOP's lambda 50, SimPO's gamma 0.5; how noisy the labels are, no paper can know."""
    assert PairConstants() == PairConstants(label_smoothing=0.0, rpo_scale=1.0, dpop_penalty=50.0, simpo_margin=0.5)


# ---- DPO and what becomes DPO


@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0])
def test_dpo_at_the_start(beta: float) -> None:
    """Margin 0: log 2, with slopes -beta / 2 per nat of the chosen response and beta / 2 of the rejected one."""
    value, chosen, rejected = value_and_slopes("dpo", START._replace(beta=beta))
    assert value == pytest.approx(math.log(2), rel=1e-12)
    assert (chosen, rejected) == pytest.approx((-beta / 2, beta / 2), rel=1e-12)


@pytest.mark.parametrize("name", ["cdpo", "robust"])
@pytest.mark.parametrize("case", CASES)
def test_without_smoothing_they_are_dpo(name: str, case: Case) -> None:
    """cdpo and robust at label_smoothing 0: the same value and slopes."""
    found = value_and_slopes(name, case, replace(CONSTANTS, label_smoothing=0.0))
    assert found == pytest.approx(value_and_slopes("dpo", case), rel=1e-12)


def test_cdpo_is_smallest_at_the_smoothed_margin() -> None:
    """0.2 of the labels wrong: no pull left where sigmoid(D) = 0.8, that is at D = log 4."""
    margin = math.log(4)
    case = Case(-10.0 + margin / 0.1, -14.0, -10.0, -14.0)
    _, chosen, rejected = value_and_slopes("cdpo", case)
    assert (chosen, rejected) == pytest.approx((0.0, 0.0), abs=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_robust_undoes_flipped_labels(case: Case) -> None:
    """The mean over a label flipped with probability 0.2 is DPO on the true one: 0.8 l(D) + 0.2 l(-D)."""
    swapped = case._replace(
        chosen=case.rejected,
        rejected=case.chosen,
        reference_chosen=case.reference_rejected,
        reference_rejected=case.reference_chosen,
    )
    mean = 0.8 * value_and_slopes("robust", case)[0] + 0.2 * value_and_slopes("robust", swapped)[0]
    assert mean == pytest.approx(value_and_slopes("dpo", case)[0], rel=1e-9)


@pytest.mark.parametrize("case", [case for case in CASES if case.chosen_score > case.rejected_score])
def test_rpo_bwd_is_dpo_where_the_scores_are_far_apart(case: Case) -> None:
    """eta d of 1,000 and more: the target is certain, its entropy 0, and KL is -log sigmoid(D)."""
    found = value_and_slopes("rpo_bwd", case, replace(CONSTANTS, rpo_scale=1e4))
    assert found == pytest.approx(value_and_slopes("dpo", case), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_dpop_is_dpo_where_the_chosen_response_did_not_fall(case: Case) -> None:
    """Its penalty is paid only where the chosen log-ratio is below 0."""
    found, plain = value_and_slopes("dpop", case), value_and_slopes("dpo", case)
    if case.reward_chosen >= 0:
        assert found == pytest.approx(plain, rel=1e-12)
    else:
        assert found[0] > plain[0]
        assert found[1] < plain[1] < 0, "the chosen response is pulled up harder"


def test_dpop_starts_as_dpo() -> None:
    """Log-ratios of exactly 0: log 2, and of the kink's two slopes that of DPO."""
    assert value_and_slopes("dpop", START) == value_and_slopes("dpo", START)


def test_dpop_of_a_fallen_response_by_hand() -> None:
    """Rewards -0.4 and -0.1, lambda 5: -log sigmoid(-0.3 - 5 0.4) = -log sigmoid(-2.3) = 2.3955."""
    case = Case(-13.0, -15.0, -9.0, -14.0)
    assert value_and_slopes("dpop", case)[0] == pytest.approx(2.3955, abs=1e-4)


# ---- squared errors


@pytest.mark.parametrize("case", CASES)
def test_slope_of_ipo_is_its_error_per_token(case: Case) -> None:
    """2 (d - 1 / (2 beta)) / tokens by a nat of the chosen response, its negative with the other's tokens."""
    difference = (case.chosen - case.reference_chosen) / case.chosen_tokens
    difference -= (case.rejected - case.reference_rejected) / case.rejected_tokens
    error = 2 * (difference - 1 / (2 * case.beta))
    _, chosen, rejected = value_and_slopes("ipo", case)
    assert chosen == pytest.approx(error / case.chosen_tokens, rel=1e-6)
    assert rejected == pytest.approx(-error / case.rejected_tokens, rel=1e-6)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("target", [0.5, 4.0])
def test_rpo_sq_of_labels_is_a_squared_error_with_one_target(case: Case, target: float) -> None:
    """Scores 1 and 0: (D - eta)^2; with eta 1/2 and one token it is beta^2 times IPO."""
    labels = case._replace(chosen_score=1.0, rejected_score=0.0, chosen_tokens=1, rejected_tokens=1)
    value, chosen, rejected = value_and_slopes("rpo_sq", labels, replace(CONSTANTS, rpo_scale=target))
    assert value == pytest.approx((case.margin - target) ** 2, rel=1e-9)
    if target == 0.5:
        ipo = value_and_slopes("ipo", labels)
        assert (value, chosen, rejected) == pytest.approx([case.beta**2 * x for x in ipo], rel=1e-9)


@pytest.mark.parametrize("name", ["rpo_sq", "rpo_bwd", "rpo_fwd"])
def test_rpo_is_zero_where_the_margin_is_that_of_the_scores(name: str) -> None:
    """Scores 0.9 and 0.4 at eta 3: nothing is left to do at D = 1.5; on either side the loss is positive."""
    case = Case(-10.0 + 15.0, -14.0, -10.0, -14.0, chosen_score=0.9, rejected_score=0.4)
    assert value_and_slopes(name, case) == pytest.approx((0.0, 0.0, 0.0), abs=1e-6)
    for nats in (-3.0, 3.0):
        value, chosen, rejected = value_and_slopes(name, case._replace(chosen=case.chosen + nats))
        assert value > 0
        assert math.copysign(1, chosen) == math.copysign(1, nats) == -math.copysign(1, rejected)


def test_hinge_ends_at_margin_one() -> None:
    """Below: slope -beta and beta per nat; above: no loss and no slope."""
    below, above = Case(-4.0, -14.0, -10.0, -14.0), Case(2.0, -14.0, -10.0, -14.0)
    assert value_and_slopes("hinge", below) == pytest.approx((0.4, -0.1, 0.1))
    assert value_and_slopes("hinge", above) == (0.0, 0.0, 0.0)


# ---- without a reference


def test_simpo_by_hand() -> None:
    """-8 nats on 4 tokens against -21 on 7, beta 2, gamma 0.7: -log sigmoid(2 (-2 + 3) - 0.7) = 0.24101."""
    assert value_and_slopes("simpo", Case(-8.0, -21.0, 0.0, 0.0, beta=2.0))[0] == pytest.approx(0.24101, abs=1e-5)


def test_contrast_of_equal_sides_by_hand() -> None:
    """Equally likely: log 2, slope -beta / 2."""
    found = value_and_slopes("contrast", Case(-8.0, -8.0, 0.0, 0.0, beta=0.2))
    assert found == pytest.approx((math.log(2), -0.1, 0.1))


def test_odds_ratio_by_hand() -> None:
    """p = 1/2 and 1/4 a token: odds 1 and 1/3, -log sigmoid(log 3) = log(4/3); beta plays no part."""
    for beta in (0.1, 1.0):
        case = Case(4 * math.log(0.5), 7 * math.log(0.25), 0.0, 0.0, beta=beta)
        assert value_and_slopes("odds_ratio", case)[0] == pytest.approx(math.log(4 / 3), rel=1e-6)


def test_odds_ratio_next_to_certainty() -> None:
    """p = 1 - 1e-4 and 1/2 a token: odds 9,999 and 1: the rarer side's slope is -(1 - sigmoid) / (1 - p) each token."""
    chosen, rejected = math.log1p(-1e-4), math.log(0.5)
    case = Case(chosen, rejected, 0.0, 0.0, 1, 1)
    value, slope_chosen, slope_rejected = value_and_slopes("odds_ratio", case)
    assert value == pytest.approx(math.log1p(1 / 9999), rel=1e-6)
    assert slope_chosen == pytest.approx(-1e-4 * 1e4, rel=1e-4)
    assert slope_rejected == pytest.approx(1e-4 * 2, rel=1e-4)


# ---- extremes

FAR = [(-1e6, 0.0), (0.0, -1e6), (-1e6, -1e6), (0.0, 0.0), (-1e6, -1.0), (-1e-9, -1e-3)]
"""Log-probs of the two sides: impossible, certain, nearly certain."""


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("beta", [0.01, 1.0])
@pytest.mark.parametrize("tokens", [1, 2000])
def test_values_and_gradients_stay_finite(name: str, beta: float, tokens: int) -> None:
    """Log-ratios of up to a million nats either way, log-probs of 0 and -1e6, with scores apart, equal and reversed.

    Rewards in float32, as in training: value and both slopes are numbers.
    """
    for chosen, rejected in FAR:
        for reference_chosen, reference_rejected in FAR:
            for scores in ((1.0, 0.0), (0.5, 0.5), (0.0, 1.0)):
                case = Case(chosen, rejected, reference_chosen, reference_rejected, tokens, tokens, *scores, beta=beta)
                found = value_and_slopes(name, case, PairConstants(label_smoothing=0.1), torch.float32)
                assert all(math.isfinite(x) for x in found), (case, found)


@pytest.mark.parametrize(
    ("name", "value", "slope_chosen"),
    [
        ("dpo", 1e6, -1.0),
        ("hinge", 1e6, -1.0),
        ("rpo_bwd", 1e6 * logistic(1.0), -logistic(1.0)),
        ("rpo_fwd", -log_logistic(-1.0), 0.0),
    ],
)
def test_a_million_nats_wrong_by_hand(name: str, value: float, slope_chosen: float) -> None:
    """Margin -1e6 at beta 1, scores 1 and 0, eta 1.

    dpo and hinge grow with it, slope -1; rpo_bwd times the target, sigmoid(1) = 0.731. rpo_fwd: a certain 0 against
    the target's 1 - sigmoid(1) is -log sigmoid(-1) = 1.313, without slope.
    """
    case = Case(-1e6, -1.0, 0.0, -1.0, 1, 1, beta=1.0)
    found, chosen, _ = value_and_slopes(name, case, PairConstants(), torch.float32)
    assert found == pytest.approx(value, rel=1e-5)
    assert chosen == pytest.approx(slope_chosen, rel=1e-5, abs=1e-9)
