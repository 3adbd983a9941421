"""Losses of the policy's own answers: by hand, and by the exact expectation of their gradient over all answers."""

from __future__ import annotations

import itertools
import math
import statistics

import pytest
import torch
from by_hand import answer, compared_step, of_kinds
from torch import Tensor

from uft_ds.objectives.objective import Objective, count_terms, objective_at

BETA = 0.3


def of_loss(loss: str, beta: float = BETA) -> Objective:
    return of_kinds({"instruction": {"mse": 1.0}, "score": {loss: 1.0}}, beta=beta)


# ---- by hand

SCORES = [0.9, 0.1, 0.4]
RATIOS = [2.0, -1.0, 0.5]
LOGPS = torch.tensor([-4.0, -3.0, -7.5], dtype=torch.float64)
SEQUENCES = [answer(score, token) for token, score in enumerate(SCORES, start=5)]


@pytest.mark.parametrize("loss", ["rloo", "reinforce", "grpo"])
def test_advantages_by_hand(loss: str) -> None:
    """From R = s - beta l: less the mean of the two others; less the mean; scores over their deviation, less the KL."""
    rewards = [score - BETA * ratio for score, ratio in zip(SCORES, RATIOS, strict=True)]
    others = [statistics.mean(rewards[:i] + rewards[i + 1 :]) for i in range(3)]
    other_ratios = [statistics.mean(RATIOS[:i] + RATIOS[i + 1 :]) for i in range(3)]
    expected = {
        "rloo": [reward - other for reward, other in zip(rewards, others, strict=True)],
        "reinforce": [reward - statistics.mean(rewards) for reward in rewards],
        "grpo": [
            (score - statistics.mean(SCORES)) / (statistics.stdev(SCORES) + 1e-4) - BETA * (ratio - other)
            for score, ratio, other in zip(SCORES, RATIOS, other_ratios, strict=True)
        ],
    }[loss]
    logps_R = LOGPS.clone().requires_grad_()
    found = compared_step(of_loss(loss), SEQUENCES, logps_R, LOGPS - torch.tensor(RATIOS))
    assert found.advantages == pytest.approx(expected, abs=1e-6)
    assert found.loss.item() == pytest.approx(-sum(map(float.__mul__, expected, LOGPS.tolist())) / 3, rel=1e-5)
    found.loss.backward()
    assert logps_R.grad is not None
    assert logps_R.grad.tolist() == pytest.approx([-advantage / 3 for advantage in expected], abs=1e-6)


def test_flat_scores_have_no_advantage_at_the_start() -> None:
    """Exactly 0 while policy and reference are the same, also under grpo, which divides by their deviation."""
    sequences = [answer(0.1, token) for token in range(5, 12)]
    logps_R = torch.linspace(-9, -3, 7, dtype=torch.float64)
    for loss in ("rloo", "grpo", "reinforce"):
        found = compared_step(of_loss(loss), sequences, logps_R, logps_R)
        assert found.advantages == [0.0] * 7
        assert found.loss.item() == 0.0


def test_grpo_magnifies_scores_that_hardly_differ() -> None:
    """Its known flaw (2503.20783): 0.001 between scores counts almost like 1; under rloo it counts as it is."""
    sequences = [answer(0.5, 5), answer(0.501, 6)]
    logps_R = torch.tensor([-4.0, -3.0], dtype=torch.float64)
    (_, of_grpo), (_, of_rloo) = (
        compared_step(of_loss(loss), sequences, logps_R, logps_R).advantages for loss in ("grpo", "rloo")
    )
    assert of_grpo == pytest.approx(0.62, abs=0.01)
    assert of_rloo == pytest.approx(0.001, rel=1e-3)


def test_it_stands_in_one_step_with_data() -> None:
    """{instruction: mse, score: rloo}: each loss over its own terms, and the instruction is no term of rloo."""
    sequences = [*SEQUENCES, answer(1.0, 9, kind="instruction", online=False)]
    logps_R = torch.tensor([*LOGPS.tolist(), -5.0], dtype=torch.float64)
    reference_R = logps_R - torch.tensor([*RATIOS, 2.0])
    uft = of_loss("rloo")
    assert count_terms(uft, [of.responses[0] for of in sequences]) == {"mse": 1, "rloo": 3, "nll": 0}
    alone = compared_step(uft, SEQUENCES, LOGPS, LOGPS - torch.tensor(RATIOS))
    both = compared_step(uft, sequences, logps_R, reference_R)
    assert both.advantages[:3] == alone.advantages
    assert math.isnan(both.advantages[3])
    of_instruction = (1 / (1 + math.exp(-BETA * 2.0)) - 1.0) ** 2
    assert both.loss.item() == pytest.approx(alone.loss.item() + of_instruction, rel=1e-6)


def test_the_schedule_of_beta_is_one_of_the_price_of_kl() -> None:
    """At the end of a run with beta_end 0.5 a nat costs half."""
    uft = of_loss("rloo", beta=BETA)
    ending = objective_at(Objective(uft.of_kind, beta_schedule="linear", beta_end=0.5), 1.0)
    reference_R = LOGPS - torch.tensor(RATIOS)
    found = compared_step(ending, SEQUENCES, LOGPS, reference_R)
    assert found.advantages == compared_step(of_loss("rloo", beta=BETA / 2), SEQUENCES, LOGPS, reference_R).advantages


def test_responses_of_data_have_no_term() -> None:
    """As in held-out data: no term, no loss, and no advantage is asked for."""
    sequences = [answer(0.5, 5, online=False), answer(0.1, 6, online=False)]
    assert count_terms(of_loss("rloo"), [of.responses[0] for of in sequences])["rloo"] == 0
    found = compared_step(of_loss("rloo"), sequences, LOGPS[:2], LOGPS[:2] - 1.0)
    assert (found.loss.item(), found.advantages) == (0.0, [])


@pytest.mark.parametrize("loss", ["rloo", "reinforce", "grpo"])
@pytest.mark.parametrize("parts", [[[0], [1, 2]], [[2, 0], [], [1]], [[0], [1], [2]]])
def test_any_packing_gives_the_same_advantages(loss: str, parts: list[list[int]]) -> None:
    """Whole in one micro-batch, or divided and forwarded ahead."""
    reference_R = LOGPS - torch.tensor(RATIOS)
    whole = compared_step(of_loss(loss), SEQUENCES, LOGPS, reference_R)
    found = compared_step(of_loss(loss), SEQUENCES, LOGPS, reference_R, parts)
    assert found.advantages == pytest.approx(whole.advantages, abs=1e-6)
    assert found.loss.item() == pytest.approx(whole.loss.item(), rel=1e-6)


# ---- a bandit: a softmax policy over a few answers of one token, with every group of answers and its probability

BANDIT_SCORES = [0.1, 0.9, 0.4, 0.0]
REFERENCE = torch.log_softmax(torch.tensor([0.3, -0.4, 0.1, 0.8], dtype=torch.float64), 0)


def policy() -> Tensor:
    return torch.tensor([0.2, -0.7, 0.5, 1.1], dtype=torch.float64, requires_grad=True)


def exact_gradient(scores: list[float], beta: float, kl_only: bool = False) -> Tensor:
    """Of -(E[s] - beta KL(pi || pi_ref)) by the policy's logits, in float64."""
    logits = policy()
    logps = torch.log_softmax(logits, 0)
    value = 0.0 if kl_only else (logps.exp() * torch.tensor(scores, dtype=torch.float64)).sum()
    (beta * (logps.exp() * (logps - REFERENCE)).sum() - value).backward()
    assert logits.grad is not None
    return logits.grad


def expected_gradient(loss: str, scores: list[float], k: int, prompts: int = 1, beta: float = BETA) -> Tensor:
    """The mean over all groups of k answers to each prompt, weighted by their probability, of the step's gradient."""
    logits = policy()
    logps = torch.log_softmax(logits, 0)
    total = torch.zeros((), dtype=torch.float64)
    for choice in itertools.product(range(len(scores)), repeat=k * prompts):
        places = torch.tensor(choice)
        sequences = [answer(scores[token], token, prompt=place // k) for place, token in enumerate(choice)]
        step = compared_step(of_loss(loss, beta), sequences, logps[places], REFERENCE[places])
        total = total + logps.detach()[places].sum().exp() * step.loss.double()
    total.backward()
    assert logits.grad is not None
    return logits.grad


@pytest.mark.parametrize("k", [2, 3])
def test_rloos_expected_gradient_is_that_of_the_objective(k: int) -> None:
    """E[s] - beta KL, exactly, for any k: also of groups in which the policy repeats an answer."""
    expected = exact_gradient(BANDIT_SCORES, BETA)
    assert expected.norm() > 0.1
    torch.testing.assert_close(expected_gradient("rloo", BANDIT_SCORES, k), expected, rtol=0, atol=2e-7)


def test_reinforces_expected_gradient_is_a_little_shorter() -> None:
    """(n - 1) / n of it, of n own answers in the step, to one prompt or to several."""
    expected = exact_gradient(BANDIT_SCORES, BETA)
    torch.testing.assert_close(expected_gradient("reinforce", BANDIT_SCORES, 3), expected * 2 / 3, rtol=0, atol=2e-7)
    torch.testing.assert_close(
        expected_gradient("reinforce", BANDIT_SCORES, 1, prompts=3), expected * 2 / 3, rtol=0, atol=2e-7
    )


@pytest.mark.parametrize("loss", ["rloo", "grpo"])
def test_the_penalty_has_the_gradient_of_the_kl(loss: str) -> None:
    """With one score for all nothing else is left: beta times the gradient of KL(pi || pi_ref)."""
    expected = exact_gradient([0.5] * 4, BETA, kl_only=True)
    torch.testing.assert_close(expected_gradient(loss, [0.5] * 4, 2), expected, rtol=0, atol=2e-7)


def test_grpo_is_not_that_gradient() -> None:
    """Its direction differs from that of the objective, also without a KL: of three answers the cosine is below 1."""
    grpo, exact = expected_gradient("grpo", BANDIT_SCORES, 3, beta=1e-12), exact_gradient(BANDIT_SCORES, 0.0)
    cosine = float(torch.nn.functional.cosine_similarity(grpo, exact, dim=0))
    assert 0.5 < cosine < 0.995
