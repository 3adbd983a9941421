"""`center: prompt`: rewards and scores of answers to one prompt, each less its mean over them."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from itertools import pairwise
from typing import Any

import pytest
import torch
from by_hand import answer, compared_step, of_kinds
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from uft_ds.data.example import Sequence
from uft_ds.objectives.objective import Objective

BETA = 0.1


def centered(loss: str = "mse", beta: float = BETA, **shared: Any) -> Objective:
    return of_kinds({"instruction": {loss: 1.0}, "score": {loss: 1.0}}, beta=beta, center="prompt", **shared)


def log_probs(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Of policy (with gradient) and reference, some nats apart."""
    generator = torch.Generator().manual_seed(seed)
    reference_R = -20 * torch.rand(count, generator=generator, dtype=torch.float64)
    return (
        reference_R + 5 * torch.randn(count, generator=generator, dtype=torch.float64)
    ).requires_grad_(), reference_R


def gradient(
    objective: Objective, sequences: Seq[Sequence], logps_R: Tensor, reference_R: Tensor, parts: Any = None
) -> Tensor:
    """Of the step's loss by each response's log-prob."""
    leaf_R = logps_R.detach().clone().requires_grad_()
    compared_step(objective, sequences, leaf_R, reference_R, parts).loss.backward()
    assert leaf_R.grad is not None
    return leaf_R.grad


GROUPS = [
    answer(1.0, 5), answer(0.0, 6), answer(0.2, 7), answer(0.0, 8),
    answer(1.0, 9, prompt=1, kind="instruction", online=False),
    answer(0.4, 5, prompt=2, online=False), answer(0.9, 6, prompt=2, online=False),
    answer(0.7, 5, prompt=3),
]  # fmt: skip
"""Four own answers to one prompt; an instruction; two answers of data; one answer that is alone."""


def by_hand(loss: str, ratios_R: Tensor) -> Tensor:
    """The mean over the eight in float64, with the means taken as numbers."""
    scores = torch.tensor([sequence.responses[0].score for sequence in GROUPS], dtype=torch.float64)
    shifts, targets = torch.zeros(8, dtype=torch.float64), scores.clone()
    for members in ([0, 1, 2, 3], [5, 6]):
        shifts[members] = BETA * ratios_R.detach()[members].mean()
        targets[members] = 0.5 + scores[members] - scores[members].mean()
    rewards = BETA * ratios_R - shifts
    if loss == "raw":
        return (rewards - (targets - 0.5)).square().mean()
    error = torch.sigmoid(rewards) - targets
    return (error.square() if loss == "mse" else error.abs()).mean()


@pytest.mark.parametrize("loss", ["mse", "l1", "raw"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_step_by_hand(loss: str, seed: int) -> None:
    """Value and gradient of every response; one target of 1.2 lies above 1 and is not cut."""
    logps_R, reference_R = log_probs(8, seed)
    found = compared_step(centered(loss), GROUPS, logps_R, reference_R)
    leaf_R = logps_R.detach().clone().requires_grad_()
    expected = by_hand(loss, leaf_R - reference_R)
    expected.backward()
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert found.targets == pytest.approx([1.2, 0.2, 0.4, 0.2, 1.0, 0.25, 0.75, 0.7], abs=1e-7)
    mine = gradient(centered(loss), GROUPS, logps_R, reference_R)
    assert mine.abs().min() > 1e-5
    torch.testing.assert_close(mine, leaf_R.grad, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("loss", ["mse", "l1", "raw"])
@pytest.mark.parametrize("score", [0.0, 0.1, 0.3, 1 / 3, 1.0])
def test_a_flat_group_is_not_pushed_at_the_start(loss: str, score: float) -> None:
    """Targets of exactly 1/2, rewards of exactly 0: no gradient at all, whatever the score. Uncentred it has one."""
    sequences = [answer(score, token) for token in range(5, 12)]
    reference_R = log_probs(7)[1]
    found = compared_step(centered(loss), sequences, reference_R, reference_R)
    assert found.targets == [0.5] * 7
    assert found.shifts == found.advantages == [0.0] * 7
    assert found.loss.item() == 0.0
    assert gradient(centered(loss), sequences, reference_R, reference_R).tolist() == [0.0] * 7
    uncentered = of_kinds({"score": {loss: 1.0}}, beta=BETA)
    assert gradient(uncentered, sequences, reference_R, reference_R).abs().min() > 1e-3


@pytest.mark.parametrize("seed", [0, 1])
def test_the_pushes_of_a_group_cancel(seed: int) -> None:
    """Under raw they add up to 0: the group's mean log-ratio is free. What is alone is pushed by itself."""
    logps_R, reference_R = log_probs(8, seed)
    grad = gradient(centered("raw"), GROUPS, logps_R, reference_R)
    for members in ([0, 1, 2, 3], [5, 6]):
        assert grad[members].abs().min() > 1e-4
        assert float(grad[members].sum()) == pytest.approx(0.0, abs=1e-8)
    assert abs(float(grad[7])) > 1e-4


def test_what_all_answers_share_plays_no_part() -> None:
    """A term of the prompt alone in rewards, and in scores: raw's own case is UNA's f(x)."""
    logps_R, reference_R = log_probs(4)
    scores = [0.1, 0.5, 0.3, 0.6]
    sequences = [answer(score, token) for token, score in enumerate(scores, start=5)]
    raised = [answer(score + 0.25, token) for token, score in enumerate(scores, start=5)]
    one = gradient(centered(), sequences, logps_R, reference_R)
    other = gradient(centered(), raised, logps_R - 3.0, reference_R)
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-9)


def test_two_answers_under_raw_are_rebel() -> None:
    """REBEL (2404.16767) regresses the difference of rewards on that of scores: half its square, value and gradient."""
    logps_R, reference_R = log_probs(2)
    sequences = [answer(0.9, 5), answer(0.2, 6)]
    leaf_R = logps_R.detach().clone().requires_grad_()
    ratios_R = BETA * (leaf_R - reference_R)
    rebel = ((ratios_R[0] - ratios_R[1]) - (0.9 - 0.2)).square()
    (rebel / 4).backward()  # half of it, over the two responses
    found = compared_step(centered("raw"), sequences, logps_R, reference_R)
    assert found.loss.item() == pytest.approx(rebel.item() / 4, rel=1e-6)
    torch.testing.assert_close(
        gradient(centered("raw"), sequences, logps_R, reference_R), leaf_R.grad, rtol=1e-6, atol=1e-9
    )


def test_each_kind_has_its_own_beta() -> None:
    """One mean in nats: (1 + 4) / 2 of them are 0.25 at beta 0.1, and 1 at 0.4."""
    uft = centered()
    of_pair = of_kinds({"pair": {"mse": 1.0}}, beta=0.4).of_kind["pair"]
    uft = Objective({**uft.of_kind, "pair": of_pair}, center="prompt")
    sequences = [answer(0.5, 5), answer(0.1, 6, kind="pair", online=False)]
    reference_R = torch.tensor([-3.0, -3.0], dtype=torch.float64)
    found = compared_step(uft, sequences, reference_R + torch.tensor([1.0, 4.0]), reference_R)
    assert found.shifts == pytest.approx([0.25, 1.0])


@given(st.permutations(range(8)), st.lists(st.integers(0, 8), max_size=4), st.sampled_from(["mse", "raw"]))
@settings(max_examples=40, deadline=None)
def test_any_packing_gives_the_same_step(order: list[int], cuts: list[int], loss: str) -> None:
    """Groups in one micro-batch or divided over several, forwarded ahead or not, in any order, beside empty ones."""
    bounds = [0, *sorted(cuts), 8]
    parts = [order[a:b] for a, b in pairwise(bounds)]
    logps_R, reference_R = log_probs(8)
    whole = compared_step(centered(loss), GROUPS, logps_R, reference_R)
    found = compared_step(centered(loss), GROUPS, logps_R, reference_R, parts)
    assert found.loss.item() == pytest.approx(whole.loss.item(), rel=1e-6)
    assert found.targets == whole.targets
    assert found.shifts == pytest.approx(whole.shifts, abs=1e-7)
    torch.testing.assert_close(
        gradient(centered(loss), GROUPS, logps_R, reference_R, parts),
        gradient(centered(loss), GROUPS, logps_R, reference_R),
        rtol=1e-5,
        atol=1e-9,
    )


def test_a_baseline_has_no_gradient() -> None:
    """The mean is a number: one answer's loss does not pull at the others."""
    logps_R, reference_R = log_probs(2)
    sequences = [answer(0.9, 5), answer(0.2, 6)]
    leaf_R = logps_R.detach().clone().requires_grad_()
    found = compared_step(centered(), sequences, leaf_R, reference_R)
    shift = float(BETA * (logps_R.detach() - reference_R).mean())
    assert found.shifts == pytest.approx([shift, shift], rel=1e-6)
    found.loss.backward()
    assert leaf_R.grad is not None
    sigma = torch.sigmoid(BETA * (logps_R.detach() - reference_R) - shift)
    target = torch.tensor([0.85, 0.15], dtype=torch.float64)
    torch.testing.assert_close(leaf_R.grad, BETA * (sigma - target) * sigma * (1 - sigma), rtol=1e-5, atol=1e-9)
