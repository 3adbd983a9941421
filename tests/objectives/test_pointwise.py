"""Implicit rewards, and the losses of one response, against formulas by hand in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from by_hand import log_logistic, logistic
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from uft_ds.data.example import KINDS, Response
from uft_ds.objectives.implicit_reward import implicit_reward, implicit_score, response_logps
from uft_ds.objectives.likelihood import is_imitated, is_undesirable, sequence_nll
from uft_ds.objectives.losses import POINTWISE, Distance
from uft_ds.objectives.pointwise import pointwise_loss

BETA = 0.1

# Value and d / d reward of each loss, in double precision.
BY_HAND: dict[Distance, tuple[Callable[[float, float], float], Callable[[float, float], float]]] = {
    "mse": (
        lambda r, score: (logistic(r) - score) ** 2,
        lambda r, score: 2 * (logistic(r) - score) * logistic(r) * logistic(-r),
    ),
    "bce": (
        lambda r, score: -score * log_logistic(r) - (1 - score) * log_logistic(-r),
        lambda r, score: logistic(r) - score,
    ),
    "l1": (
        lambda r, score: abs(logistic(r) - score),
        lambda r, score: math.copysign(1, logistic(r) - score) * logistic(r) * logistic(-r),
    ),
    "raw": (lambda r, score: (r - (score - 0.5)) ** 2, lambda r, score: 2 * (r - (score - 0.5))),
}


def loss_and_slope(
    log_ratios: list[float], scores: list[float], beta: float, distance: Distance
) -> tuple[Tensor, Tensor]:
    """The loss of each response, and its slope by the log-ratio."""
    ratios_R = torch.tensor(log_ratios, requires_grad=True)
    loss_R = pointwise_loss(implicit_reward(ratios_R, beta), torch.tensor(scores), distance)
    assert loss_R.dtype == torch.float32
    loss_R.sum().backward()
    assert ratios_R.grad is not None
    return loss_R.detach(), ratios_R.grad


# ---- formulas


def test_every_pointwise_loss_is_tested() -> None:
    """What follows goes over all of them."""
    assert set(BY_HAND) == set(POINTWISE)


@pytest.mark.parametrize("distance", POINTWISE)
@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0])
def test_pointwise_losses_equal_their_formulas(distance: Distance, beta: float) -> None:
    """Rewards from -9 to 9 and scores from 0 to 1: value and slope equal the formula in float64.

    The slope by the log-ratio is beta times the slope by the reward. 1e-6 absolute: sigmoid minus score cancels.
    """
    rewards = [-9.0, -2.5, -0.3, 0.0, 0.7, 3.0, 9.0]
    scores = [0.0, 0.2, 0.51, 0.9, 1.0]
    grid = [(reward / beta, score) for reward in rewards for score in scores]
    loss_R, slope_R = loss_and_slope([ratio for ratio, _ in grid], [score for _, score in grid], beta, distance)
    value, slope = BY_HAND[distance]
    for i, (ratio, score) in enumerate(grid):
        assert float(loss_R[i]) == pytest.approx(value(beta * ratio, score), rel=1e-5, abs=1e-6), grid[i]
        assert float(slope_R[i]) == pytest.approx(beta * slope(beta * ratio, score), rel=1e-5, abs=1e-6 * beta), grid[i]


def test_uft_loss_at_the_start_is_a_quarter() -> None:
    """Log-ratio 0, score 1: (0.5 - 1)^2 = 0.25, and its slope 2 (-0.5) 0.25 beta = -beta / 4 per nat."""
    loss_R, slope_R = loss_and_slope([0.0], [1.0], 0.01, "mse")
    assert float(loss_R) == 0.25
    assert float(slope_R) == pytest.approx(-0.01 / 4, rel=1e-6)


@pytest.mark.parametrize(
    ("distance", "value", "slope"), [("bce", math.log(2), -0.5), ("l1", 0.5, -0.25), ("raw", 0.25, -1.0)]
)
def test_other_losses_at_the_start(distance: Distance, value: float, slope: float) -> None:
    """Log-ratio 0, score 1: bce log 2 with slope -1/2 a reward, l1 1/2 with -1/4, raw (0 - 1/2)^2 with -1."""
    loss_R, slope_R = loss_and_slope([0.0], [1.0], BETA, distance)
    assert float(loss_R) == pytest.approx(value, rel=1e-6)
    assert float(slope_R) == pytest.approx(slope * BETA, rel=1e-6)


@pytest.mark.parametrize("distance", ["mse", "bce", "l1"])
@given(score=st.floats(0.05, 0.95), offset=st.floats(0.01, 3.0), beta=st.sampled_from([0.01, 0.1, 1.0]))
@settings(max_examples=50, deadline=None)
def test_gradient_turns_where_the_implicit_score_is_the_score(
    distance: Distance, score: float, offset: float, beta: float
) -> None:
    """Below logit(score) the loss falls with the reward, above it rises: responses are pulled to their score."""
    logit = math.log(score / (1 - score))
    _, slope_R = loss_and_slope([(logit - offset) / beta, (logit + offset) / beta], [score, score], beta, distance)
    assert float(slope_R[0]) < 0 < float(slope_R[1])


@given(score=st.floats(0.0, 1.0), offset=st.floats(0.001, 3.0))
@settings(max_examples=50, deadline=None)
def test_gradient_of_raw_turns_at_the_score_less_a_half(score: float, offset: float) -> None:
    """A reward of 0 stands for the score 1/2: the smallest loss is at r = score - 1/2."""
    middle = (score - 0.5) / BETA
    ratios = [middle - offset / BETA, middle, middle + offset / BETA]
    loss_R, slope_R = loss_and_slope(ratios, [score] * 3, BETA, "raw")
    assert float(slope_R[0]) < 0 < float(slope_R[2])
    assert float(loss_R[1]) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("ratio", [-30.0, -1.0, 0.0, 4.0, 80.0])
def test_raw_is_sppo_times_beta_squared(beta: float, ratio: float) -> None:
    """SPPO: (l - 1 / (2 beta))^2 for the winner and (l + 1 / (2 beta))^2 for the loser."""
    loss_R, _ = loss_and_slope([ratio, ratio], [1.0, 0.0], beta, "raw")
    winner, loser = (ratio - 0.5 / beta) ** 2, (ratio + 0.5 / beta) ** 2
    assert loss_R.tolist() == pytest.approx([beta**2 * winner, beta**2 * loser], rel=1e-5, abs=1e-6)


# ---- extremes


@pytest.mark.parametrize("distance", POINTWISE)
@pytest.mark.parametrize("ratio", [-1e6, 1e6])
@pytest.mark.parametrize("beta", [0.01, 1.0])
@pytest.mark.parametrize("score", [0.0, 0.5, 1.0])
def test_losses_are_finite_a_million_nats_away(distance: Distance, ratio: float, beta: float, score: float) -> None:
    """Finite loss, finite slope."""
    loss_R, slope_R = loss_and_slope([ratio], [score], beta, distance)
    assert torch.isfinite(loss_R).all()
    assert torch.isfinite(slope_R).all()


@pytest.mark.parametrize(("distance", "largest"), [("mse", 1e38), ("bce", 1e38), ("l1", 1e38), ("raw", 1e19)])
@pytest.mark.parametrize("score", [0.0, 0.5, 1.0])
def test_losses_are_finite_for_the_largest_rewards(distance: Distance, largest: float, score: float) -> None:
    """Up to 1e38 where the reward itself is the most that comes out, up to 1e19 where it is squared: float32 ends
    at 3.4e38.
    """
    loss_R, slope_R = loss_and_slope([-largest, largest], [score, score], 1.0, distance)
    assert torch.isfinite(loss_R).all()
    assert torch.isfinite(slope_R).all()


@pytest.mark.parametrize(
    ("distance", "value", "slope"), [("bce", 1e5, -BETA), ("mse", 1.0, 0.0), ("l1", 1.0, 0.0), ("raw", 1e10, -2e4)]
)
def test_losses_of_a_million_nats_by_hand(distance: Distance, value: float, slope: float) -> None:
    """Log-ratio -1e6, beta 0.1, score 1: r = -1e5.

    bce is |r| with slope -beta; mse and l1 are 1 with slope 0; raw is r^2 = 1e10 with slope 2 r beta = -2e4.
    """
    loss_R, slope_R = loss_and_slope([-1e6], [1.0], BETA, distance)
    assert float(loss_R) == pytest.approx(value, rel=1e-4)
    assert float(slope_R) == pytest.approx(slope, rel=1e-4)


# ---- rewards, log-probs of responses


def test_implicit_reward_and_score_by_hand() -> None:
    """10 nats at beta 0.1 are a reward of 1 and a score of 0.7310586; each response may have its own beta."""
    assert float(implicit_reward(torch.tensor(10.0), 0.1)) == 1.0
    assert float(implicit_score(torch.tensor(1.0))) == pytest.approx(0.7310585786)
    rewards_R = implicit_reward(torch.tensor([10.0, 10.0]), torch.tensor([0.1, 0.5]))
    assert rewards_R.tolist() == [1.0, 5.0]


def test_response_log_probs_are_sums_over_their_own_tokens() -> None:
    """Tokens -1, -2, -4, -8 of responses 0, 0, 2, 2: -3, 0 and -12; float64 even from bfloat16."""
    token_logps_N = torch.tensor([-1.0, -2.0, -4.0, -8.0], dtype=torch.bfloat16)
    sums_R = response_logps(token_logps_N, torch.tensor([0, 0, 2, 2]), 3)
    assert sums_R.tolist() == [-3.0, 0.0, -12.0]
    assert sums_R.dtype == torch.float64


def test_every_token_of_a_response_gets_its_slope() -> None:
    """Response 0 weighed 2 and response 1 weighed -3: the tokens' slopes are 2, -3, 2."""
    token_logps_N = torch.zeros(3, requires_grad=True)
    sums_R = response_logps(token_logps_N, torch.tensor([0, 1, 0]), 2)
    (sums_R * torch.tensor([2.0, -3.0])).sum().backward()
    assert token_logps_N.grad is not None
    assert token_logps_N.grad.tolist() == [2.0, -3.0, 2.0]


def test_a_long_response_keeps_the_digits_of_its_log_ratio() -> None:
    """20,000 tokens of about -8 nats, 2^-12 apart: 4.8828125 nats; float32 sums of 160,000 are off by hundredths."""
    reference_N = -8.0 - (torch.arange(20_000) % 7).float() / 8
    one_R = torch.zeros(20_000, dtype=torch.int64)
    policy_R, reference_R = (response_logps(logps_N, one_R, 1) for logps_N in (reference_N + 2.0**-12, reference_N))
    assert (policy_R - reference_R).item() == 20_000 * 2.0**-12


# ---- likelihood


def test_nll_is_minus_the_log_prob_of_each_response() -> None:
    """One value a response, with slope -1."""
    logps_R = torch.tensor([-0.5, -3.0], requires_grad=True)
    nll_R = sequence_nll(logps_R)
    assert nll_R.tolist() == [0.5, 3.0]
    nll_R.sum().backward()
    assert logps_R.grad is not None
    assert logps_R.grad.tolist() == [-1.0, -1.0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("score", [0.0, 0.49, 0.5, 1.0])
def test_only_a_binary_label_below_a_half_is_undesirable(kind: str, score: float) -> None:
    """A low score of another kind is a measurement, not a verdict."""
    response = Response(1, 2, score, kind)  # type: ignore[arg-type]
    expected = kind == "binary" and score < 0.5
    assert is_undesirable(response) == expected
    assert is_imitated(response, is_rejected=False) == (not expected)
    assert not is_imitated(response, is_rejected=True)
