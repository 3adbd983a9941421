"""Losses against float64 formulas by hand, and a step's loss against its shares."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from toy import toy_sequences

from uft_ds.data.example import KINDS, Kind, Response, Sequence
from uft_ds.data.micro_batch import MicroBatch, micro_batch
from uft_ds.objectives.implicit_reward import implicit_reward, implicit_score, response_logps
from uft_ds.objectives.likelihood import sequence_nll
from uft_ds.objectives.objective import (
    SATURATED_BELOW,
    STATISTICS,
    Objective,
    count_terms,
    micro_batch_loss,
)
from uft_ds.objectives.pointwise import Distance, pointwise_loss
from uft_ds.training.metrics import step_metrics

DISTANCES: tuple[Distance, ...] = ("mse", "bce", "l1")

BETA = 0.1


def share(
    uft: Objective, batch: MicroBatch, terms: dict[str, int], logps_N: Tensor, reference_N: Tensor | None
) -> tuple:
    """`micro_batch_loss` from log-probs of tokens."""
    sums = [
        None if x is None else response_logps(x, batch.response_of_N, batch.num_responses)
        for x in (logps_N, reference_N)
    ]
    return micro_batch_loss(uft, batch, terms, *sums)


EQUAL_WEIGHTS: dict[Kind, float] = dict.fromkeys(KINDS, 1.0)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


# Value and d / d reward of each loss, in double precision.
BY_HAND: dict[str, tuple[Callable[[float, float], float], Callable[[float, float], float]]] = {
    "mse": (
        lambda r, score: (sigmoid(r) - score) ** 2,
        lambda r, score: 2 * (sigmoid(r) - score) * sigmoid(r) * sigmoid(-r),
    ),
    "bce": (
        lambda r, score: -score * math.log(sigmoid(r)) - (1 - score) * math.log(sigmoid(-r)),
        lambda r, score: sigmoid(r) - score,
    ),
    "l1": (
        lambda r, score: abs(sigmoid(r) - score),
        lambda r, score: math.copysign(1, sigmoid(r) - score) * sigmoid(r) * sigmoid(-r),
    ),
}


def loss_and_slope(log_ratios_R: list[float], scores_R: list[float], beta: float, distance: Distance) -> tuple:
    ratios_R = torch.tensor(log_ratios_R, requires_grad=True)
    loss_R = pointwise_loss(ratios_R, torch.tensor(scores_R), beta=beta, distance=distance)
    assert loss_R.dtype == torch.float32
    loss_R.sum().backward()
    assert ratios_R.grad is not None
    return loss_R.detach(), ratios_R.grad


@pytest.mark.parametrize("distance", DISTANCES)
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


@pytest.mark.parametrize("distance", DISTANCES)
@given(score=st.floats(0.05, 0.95), offset=st.floats(0.01, 3.0), beta=st.sampled_from([0.01, 0.1, 1.0]))
@settings(max_examples=50, deadline=None)
def test_gradient_turns_where_the_implicit_score_is_the_score(
    distance: Distance, score: float, offset: float, beta: float
) -> None:
    """Below logit(score) the loss falls with the reward, above it rises: responses are pulled to their score."""
    logit = math.log(score / (1 - score))
    _, slope_R = loss_and_slope([(logit - offset) / beta, (logit + offset) / beta], [score, score], beta, distance)
    assert float(slope_R[0]) < 0 < float(slope_R[1])


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("ratio", [-1e6, 1e6, -1e38, 1e38])
@pytest.mark.parametrize("score", [0.0, 0.5, 1.0])
def test_losses_are_finite_for_any_finite_log_ratio(distance: Distance, ratio: float, score: float) -> None:
    """A million nats from the reference (and 1e38): finite loss, finite slope."""
    loss_R, slope_R = loss_and_slope([ratio], [score], BETA, distance)
    assert torch.isfinite(loss_R).all()
    assert torch.isfinite(slope_R).all()


def test_losses_of_a_million_nats_by_hand() -> None:
    """Log-ratio -1e6, beta 0.1, score 1: bce is the reward's size, 1e5, slope -beta; mse and l1 are 1, slope 0."""
    for distance, expected, slope in (("bce", 1e5, -BETA), ("mse", 1.0, 0.0), ("l1", 1.0, 0.0)):
        loss_R, slope_R = loss_and_slope([-1e6], [1.0], BETA, distance)  # type: ignore[arg-type]
        assert float(loss_R) == pytest.approx(expected)
        assert float(slope_R) == pytest.approx(slope)


def test_implicit_reward_and_score_by_hand() -> None:
    """10 nats at beta 0.1 are a reward of 1 and a score of 0.7310586."""
    assert float(implicit_reward(torch.tensor(10.0), 0.1)) == 1.0
    assert float(implicit_score(torch.tensor(10.0), 0.1)) == pytest.approx(0.7310585786)


def test_response_log_probs_are_sums_over_their_own_tokens() -> None:
    """Tokens -1, -2, -4, -8 of responses 0, 0, 2, 2: -3, 0 and -12; float64 even from bfloat16."""
    token_logps_N = torch.tensor([-1.0, -2.0, -4.0, -8.0], dtype=torch.bfloat16)
    sums_R = response_logps(token_logps_N, torch.tensor([0, 0, 2, 2]), 3)
    assert sums_R.tolist() == [-3.0, 0.0, -12.0]
    assert sums_R.dtype == torch.float64


def test_a_long_response_keeps_the_digits_of_its_log_ratio() -> None:
    """20,000 tokens of about -8 nats, 2^-12 apart: 4.8828125 nats; float32 sums of 160,000 are off by hundredths."""
    reference_N = -8.0 - (torch.arange(20_000) % 7).float() / 8
    one_R = torch.zeros(20_000, dtype=torch.int64)
    policy_R, reference_R = (response_logps(logps_N, one_R, 1) for logps_N in (reference_N + 2.0**-12, reference_N))
    assert (policy_R - reference_R).item() == 20_000 * 2.0**-12


def test_nll_is_minus_the_log_prob_of_each_response() -> None:
    """One value a response, with slope -1."""
    logps_R = torch.tensor([-0.5, -3.0], requires_grad=True)
    nll_R = sequence_nll(logps_R)
    assert nll_R.tolist() == [0.5, 3.0]
    nll_R.sum().backward()
    assert logps_R.grad is not None
    assert logps_R.grad.tolist() == [-1.0, -1.0]


# ---- a micro-batch's share of the step's loss


def objective(
    loss: str | dict[Kind, str], weights: dict[Kind, float] | None = None, *, beta: float = BETA
) -> Objective:
    loss_of_kind: dict[Kind, str] = dict.fromkeys(KINDS, loss) if isinstance(loss, str) else loss
    return Objective(loss_of_kind, EQUAL_WEIGHTS | (weights or {}), beta)


MIXED: dict[Kind, str] = {"instruction": "nll", "score": "mse", "binary": "bce", "pair": "l1"}
MIXED_WEIGHTS: dict[Kind, float] = {"instruction": 0.5, "score": 2.0, "binary": 1.0, "pair": 3.0}


def sequences_of_all_kinds() -> tuple[Sequence, ...]:
    """Eight toy sequences, their responses' kinds in turn."""
    sequences, number = [], 0
    for sequence in toy_sequences(8):
        responses = []
        for response in sequence.responses:
            kind = KINDS[number % len(KINDS)]
            responses.append(Response(response.start, response.end, response.score, kind, response.origin))
            number += 1
        sequences.append(Sequence(sequence.token_ids_T, tuple(responses)))
    return tuple(sequences)


def log_probs(sequences: tuple[Sequence, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """Random log-probs of policy (with gradient) and reference, for each sequence's supervised tokens."""
    generator = torch.Generator().manual_seed(0)
    sizes = [sum(response.num_tokens for response in sequence.responses) for sequence in sequences]
    policy = [(-torch.rand(size, generator=generator) * 5).requires_grad_() for size in sizes]
    return policy, [-torch.rand(size, generator=generator) * 5 for size in sizes]


def total(
    uft: Objective, sequences: tuple[Sequence, ...], groups: list[list[int]]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Loss, statistics and gradients of a step whose micro-batches hold the sequences of `groups`."""
    policy, reference = log_probs(sequences)
    terms = count_terms(uft, [response for sequence in sequences for response in sequence.responses])
    loss_sum = torch.zeros((), dtype=torch.float64)
    sums = torch.zeros(len(KINDS), len(STATISTICS), dtype=torch.float64)
    for group in groups:
        batch = micro_batch([sequences[i] for i in group])
        logps_N = torch.cat([policy[i] for i in group]) if group else torch.zeros(0, requires_grad=True)
        reference_N = torch.cat([reference[i] for i in group]) if group else torch.zeros(0)
        loss, statistics = share(uft, batch, terms, logps_N, reference_N)
        loss.backward()
        loss_sum += loss.detach()
        sums += statistics
    return loss_sum, sums, [logps.grad for logps in policy if logps.grad is not None]


@pytest.mark.parametrize("loss", ["mse", "bce", "l1", "nll", MIXED], ids=str)
@given(cuts=st.lists(st.integers(0, 8), max_size=5), order=st.permutations(range(8)))
@settings(max_examples=15, deadline=None)
def test_any_split_into_micro_batches_adds_up_to_the_whole(
    loss: str | dict[Kind, str], cuts: list[int], order: list[int]
) -> None:
    """Invariant 2 in small: values, gradients and statistics do not depend on the split, or on empty parts."""
    uft, sequences = objective(loss, MIXED_WEIGHTS), sequences_of_all_kinds()
    bounds = [0, *sorted(cuts), 8]
    groups = [order[a:b] for a, b in pairwise(bounds)]
    whole_loss, whole_sums, whole_grads = total(uft, sequences, [list(range(8))])
    loss_sum, sums, grads = total(uft, sequences, groups)
    torch.testing.assert_close(loss_sum, whole_loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(sums, whole_sums, rtol=1e-6, atol=1e-6)
    assert len(grads) == 8
    for grad, whole in zip(grads, whole_grads, strict=True):
        torch.testing.assert_close(grad, whole, rtol=1e-5, atol=1e-9)


def two_responses(kinds: tuple[Kind, Kind] = ("instruction", "score")) -> MicroBatch:
    """Two responses of 2 and 3 tokens with scores 1.0 and 0.25."""
    responses = (Response(1, 3, 1.0, kinds[0], "a:1"), Response(4, 7, 0.25, kinds[1], "a:2"))
    return micro_batch([Sequence(np.arange(7, dtype=np.int32), responses)])


def test_kinds_have_their_own_loss_weight_and_count() -> None:
    """By hand: nll over 10 tokens of the step with weight 0.5, mse over 4 responses with weight 2.

    nll: 0.5 (1 + 2) / 10 = 0.15; log-ratio of the other 3 - 3 = 0: 2 (0.5 - 0.25)^2 / 4 = 0.03125.
    """
    uft = objective({**dict.fromkeys(KINDS, "mse"), "instruction": "nll"}, {"instruction": 0.5, "score": 2.0})
    logps_N = torch.tensor([-1.0, -2.0, -1.0, -1.0, -1.0], requires_grad=True)
    reference_N = torch.tensor([-7.0, -7.0, -1.0, -1.0, -1.0])
    loss, sums = share(uft, two_responses(), {"nll": 10, "mse": 4}, logps_N, reference_N)
    assert loss.item() == pytest.approx(0.15 + 0.03125, rel=1e-6)
    loss.backward()
    # mse: 2 / 4 x 2 (0.5 - 0.25) x 0.25 x beta
    assert logps_N.grad is not None
    assert logps_N.grad.tolist() == pytest.approx([-0.05, -0.05, *[0.0625 * BETA] * 3])
    losses = sums[:, STATISTICS.index("loss")]
    assert losses.tolist() == pytest.approx([3.0, 0.0625, 0.0, 0.0]), "means by kind are without weights"


def test_terms_are_tokens_for_nll_and_responses_otherwise() -> None:
    """Responses of 2, 3 and 4 tokens: 2 + 4 terms of nll and 1 of mse; a loss without responses has no entry."""
    responses = [
        Response(1, 3, 1.0, "instruction", "a"),
        Response(1, 4, 1.0, "score", "b"),
        Response(1, 5, 1.0, "instruction", "c"),
    ]
    uft = objective({"instruction": "nll", "score": "mse", "binary": "bce", "pair": "l1"})
    assert count_terms(uft, responses) == {"nll": 6, "mse": 1}
    assert count_terms(objective("bce"), responses) == {"bce": 3}
    assert count_terms(uft, []) == {}


def test_only_supervised_fine_tuning_needs_no_reference() -> None:
    """nll for all kinds: no; one pointwise kind: yes."""
    assert not objective("nll").needs_reference
    assert objective(MIXED).needs_reference


def test_supervised_fine_tuning_runs_without_a_reference() -> None:
    """The mean over tokens, (1 + 2 + 3 + 4 + 5) / 5 = 3, and no statistics of log-ratios."""
    uft, batch = objective("nll"), two_responses()
    logps_N = -torch.arange(1.0, 6.0).requires_grad_()
    loss, sums = share(uft, batch, count_terms(uft, batch.responses), logps_N, None)
    assert loss.item() == pytest.approx(3.0)
    metrics = step_metrics(uft, loss.item(), sums)
    assert metrics["loss/instruction"] == pytest.approx(1.5)
    assert metrics["loss/score"] == pytest.approx(4.0)
    assert not any("log_ratio" in name or "implicit" in name for name in metrics)


@pytest.mark.parametrize("loss", ["mse", "nll", MIXED], ids=str)
def test_an_empty_micro_batch_has_a_zero_loss_with_a_graph(loss: str | dict[Kind, str]) -> None:
    """A rank with nothing left must still walk back: loss 0, gradient 0 (not None), statistics 0."""
    uft = objective(loss)
    below = torch.randn(3, requires_grad=True)
    logps_N = below[torch.zeros(0, dtype=torch.int64)]
    loss_share, sums = share(uft, micro_batch([]), {}, logps_N, torch.zeros(0))
    assert loss_share.shape == ()
    assert loss_share.item() == 0.0
    loss_share.backward()
    assert below.grad is not None
    assert below.grad.tolist() == [0.0, 0.0, 0.0]
    assert not sums.any()
    assert sums.shape == (len(KINDS), len(STATISTICS))


def test_log_ratios_of_long_responses_keep_their_precision() -> None:
    """Sums of thousands of nats differ by 1e-3 a token: the log-ratio is right to 1e-6 nats, as float64 says."""
    generator = torch.Generator().manual_seed(0)
    response = Response(1, 4001, 0.3, "score", "long:1")
    batch = micro_batch([Sequence(np.zeros(4001, dtype=np.int32), (response,))])
    reference_N = -torch.rand(4000, generator=generator) * 8
    logps_N = reference_N + torch.randn(4000, generator=generator) * 1e-3
    expected = (logps_N.double() - reference_N.double()).sum()
    _, sums = share(objective("mse"), batch, {"mse": 1}, logps_N, reference_N)
    found = sums[KINDS.index("score"), STATISTICS.index("log_ratio")]
    assert abs(float(found - expected)) < 1e-6


# ---- statistics


def three_responses(log_ratios_R: list[float]) -> tuple[Objective, MicroBatch, Tensor]:
    """Instruction 1.0 (1 token), score 0.5 (2 tokens), instruction 1.0 (3 tokens); one token carries the ratio."""
    responses = (
        Response(1, 2, 1.0, "instruction", "a:1"),
        Response(3, 5, 0.5, "score", "a:2"),
        Response(6, 9, 1.0, "instruction", "a:3"),
    )
    batch = micro_batch([Sequence(np.arange(9, dtype=np.int32), responses)])
    logps_N = torch.zeros(6)
    logps_N[[0, 1, 3]] = torch.tensor(log_ratios_R)
    return objective("mse"), batch, logps_N


def test_statistics_by_hand() -> None:
    """Log-ratios 80, 0, -80 at beta 0.1: rewards 8, 0, -8, so sigma (1 - sigma) = 3.4e-4 < 2.5e-3 at both ends.

    The first instruction is fitted (sigmoid(8) = 0.9997, score 1), the last is stuck (0.0003 against 1).
    """
    uft, batch, logps_N = three_responses([80.0, 0.0, -80.0])
    loss, sums = share(uft, batch, {"mse": 3}, logps_N, torch.zeros(6))
    high, low = sigmoid(8), sigmoid(-8)
    expected = {
        "responses": [2, 1],
        "tokens": [4, 2],
        "loss": [(high - 1) ** 2 + (low - 1) ** 2, 0.0],
        "loss_terms": [2, 1],
        "implicit_reward": [0.0, 0.0],
        "implicit_score": [high + low, 0.5],
        "log_ratio": [0.0, 0.0],
        "saturated": [2, 0],
        "saturated_stuck": [1, 0],
    }
    assert set(expected) == set(STATISTICS)
    for name, values in expected.items():
        column = sums[:, STATISTICS.index(name)].tolist()
        assert column == pytest.approx([*values, 0.0, 0.0], abs=1e-6), name
    assert loss.item() == pytest.approx(((high - 1) ** 2 + (low - 1) ** 2) / 3, rel=1e-5)
    assert sums.dtype == torch.float64
    assert not sums.requires_grad


@pytest.mark.parametrize(("reward", "saturated"), [(5.9, 0), (6.1, 1), (-5.9, 0), (-6.1, 1)])
def test_saturated_means_under_one_percent_of_the_largest_slope(reward: float, saturated: int) -> None:
    """sigma (1 - sigma) = 0.0025 at |reward| = 5.9864."""
    assert sigmoid(5.9864) * sigmoid(-5.9864) == pytest.approx(SATURATED_BELOW, rel=1e-3)
    uft, batch, logps_N = three_responses([0.0, reward / BETA, 0.0])
    _, sums = share(uft, batch, {"mse": 3}, logps_N, torch.zeros(6))
    assert sums[KINDS.index("score"), STATISTICS.index("saturated")] == saturated
    assert sums[KINDS.index("score"), STATISTICS.index("saturated_stuck")] == saturated, "0.998 is far from 0.5"


def test_step_metrics_are_means_under_the_documented_names() -> None:
    """The documented names (docs/metrics.md), for the kinds that occur; means over the kind's responses."""
    uft, batch, logps_N = three_responses([80.0, 10.0, -70.0])
    loss, sums = share(uft, batch, {"mse": 3}, logps_N, torch.zeros(6))
    metrics = step_metrics(uft, loss.item(), sums)
    documented = ("loss", "implicit_reward", "implicit_score", "log_ratio", "saturated", "response_tokens")
    names = {f"{name}/{kind}" for name in documented for kind in ("instruction", "score")}
    assert {"loss", *names} <= set(metrics)
    assert not any(name.endswith(("/binary", "/pair")) for name in metrics)
    assert metrics["loss"] == pytest.approx(loss.item())
    assert metrics["log_ratio/instruction"] == pytest.approx((80 - 70) / 2)
    assert metrics["implicit_reward/instruction"] == pytest.approx((8 - 7) / 2)
    assert metrics["implicit_reward/score"] == pytest.approx(1.0)
    assert metrics["implicit_score/score"] == pytest.approx(sigmoid(1.0))
    assert metrics["loss/score"] == pytest.approx((sigmoid(1.0) - 0.5) ** 2)
    assert metrics["response_tokens/instruction"] == 2.0
    assert metrics["saturated/instruction"] == 1.0
    assert metrics["saturated_stuck/instruction"] == 0.5


def test_loss_of_nll_is_reported_as_a_mean_over_tokens() -> None:
    """Instruction responses of 1 and 3 tokens with nll 1, 2, 3, 4: 10 / 4, not the mean of 1 and 9."""
    _, batch, _ = three_responses([0.0, 0.0, 0.0])
    uft = objective("nll")
    logps_N = -torch.tensor([1.0, 0.0, 0.0, 2.0, 3.0, 4.0])
    loss, sums = share(uft, batch, count_terms(uft, batch.responses), logps_N, None)
    metrics = step_metrics(uft, loss.item(), sums)
    assert metrics["loss/instruction"] == pytest.approx(2.5)
    assert metrics["loss"] == pytest.approx(10 / 6)
