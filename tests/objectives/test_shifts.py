"""The shifts of a step's responses, from their log-ratios."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import replace

import pytest
import torch
from by_hand import of_kinds, pair, single

from uft_ds.data.example import Sequence
from uft_ds.data.micro_batch import micro_batch
from uft_ds.data.mixture import Step
from uft_ds.objectives.groups import group_means, groups_of
from uft_ds.objectives.objective import log_ratios_of
from uft_ds.objectives.reward_shift import RewardShift, ShiftName
from uft_ds.objectives.shifts import StepShift, compared_with


def shifts_by(
    name: ShiftName, sequences: Seq[Sequence], rewards: Seq[float], nats: float = 70.0, pair: str = "mse"
) -> list[float] | None:
    """The shift of each response of a step that is one micro-batch, at beta 0.1, of pairs 0.4. rewards: at beta 0.1.

    It is the same whether groups are forwarded ahead or compared within the micro-batch.
    """
    uft = of_kinds(
        {"instruction": {"nll": 1.0}, "score": {"mse": 1.0}, "pair": {pair: 1.0}}, shift=RewardShift(name, value=0.25)
    )
    uft = replace(uft, of_kind={**uft.of_kind, "pair": replace(uft.of_kind["pair"], beta=0.4)})
    batch, reference_R = micro_batch(sequences), torch.full((len(rewards),), -3.0).double()
    ratios_R = log_ratios_of(uft, batch, reference_R + 10 * torch.tensor(rewards).double(), reference_R)
    names = [(key, response.kind) for key, response in zip(batch.response_keys, batch.responses, strict=True)]
    step = Step(0, tuple(sequences))
    groups = groups_of(uft, step)
    every = set(range(len(groups.found)))
    means = group_means(uft, groups, every, step, dict(zip(names, ratios_R.tolist(), strict=True)))
    found = []
    for ahead in (means, {}):
        (compared,) = compared_with(uft, StepShift(nats, groups, ahead), [batch])
        if compared is None:
            return None
        baselines = compared.with_log_ratios(ratios_R)
        assert torch.equal(baselines.targets_R, batch.scores_R)
        assert baselines.advantages_R.isnan().all()
        found.append(baselines.shifts_R.tolist())
    assert found[0] == pytest.approx(found[1], abs=1e-7)
    return found[0]


SINGLES = [single("score", 0.5, 2, first=10), single("instruction", 1.0, 2, first=20), single("pair", 1.0, 2, first=30)]


def test_no_shift_is_none() -> None:
    """Nothing is subtracted, nothing is computed."""
    assert shifts_by("none", SINGLES, [1.0, 2.0, 3.0]) is None


def test_a_constant_is_a_reward() -> None:
    """The recipe's value, whatever beta; 0 for kinds under a likelihood or a loss of pairs."""
    assert shifts_by("constant", SINGLES, [1.0, 2.0, 3.0]) == [0.25, 0.0, 0.25]
    assert shifts_by("constant", SINGLES, [1.0, 2.0, 3.0], pair="dpo") == [0.25, 0.0, 0.0]


@pytest.mark.parametrize("name", ["ema", "kl"])
def test_each_kind_is_shifted_by_its_own_beta(name: ShiftName) -> None:
    """One estimate in nats: 70 of them are a reward of 7 at beta 0.1, and of 28 at 0.4."""
    assert shifts_by(name, SINGLES, [1.0, 2.0, 3.0]) == pytest.approx([7.0, 0.0, 28.0])
    assert shifts_by(name, SINGLES, [1.0, 2.0, 3.0], pair="dpo") == pytest.approx([7.0, 0.0, 0.0])


def test_means_of_prompts_by_hand() -> None:
    """Rewards 1 and 4 to one prompt, 2, 2 and 5 to another: 2.5 and 3; 0 for the one that would be its own shift."""
    sizes = [2, 2, 2, 3, 3, 4]
    prompts = [10, 50, 90, 50, 10, 50]
    sequences = [single("score", 0.5, size, first=prompt) for size, prompt in zip(sizes, prompts, strict=True)]
    assert shifts_by("prompt_mean", sequences, [1.0, 2.0, 7.0, 2.0, 4.0, 5.0]) == pytest.approx(
        [2.5, 3.0, 0.0, 3.0, 2.5, 3.0]
    )


def test_means_of_prompts_leave_out_what_meets_no_score() -> None:
    """An imitated answer to the same prompt is no member, and has no shift; a pair's two sides shift each other."""
    one_prompt = [single("score", 0.5, 2), single("instruction", 1.0, 3), single("score", 0.1, 4)]
    assert shifts_by("prompt_mean", one_prompt, [1.0, 9.0, 3.0]) == pytest.approx([2.0, 0.0, 2.0])
    assert shifts_by("prompt_mean", one_prompt[:2], [1.0, 9.0]) == [0.0, 0.0]
    assert shifts_by("prompt_mean", pair(0, (2, 3)), [1.0, -2.0]) == pytest.approx([-2.0, -2.0]), "at beta 0.4"
