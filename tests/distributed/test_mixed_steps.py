"""Invariant 2 for steps that mix kinds, losses and pairs, under every shift: who holds what plays no part."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import engine_of
from ranks import run_on_ranks
from tiny import VOCAB_SIZE
from toy import toy_model

from uft_ds.data.example import Kind, Response, Sequence
from uft_ds.data.micro_batch import micro_batch
from uft_ds.data.mixture import Step
from uft_ds.objectives.objective import KindObjective, Objective, count_terms, micro_batch_loss
from uft_ds.objectives.reward_shift import RewardShift, ShiftName
from uft_ds.training.evaluate import evaluate
from uft_ds.training.reference_cache import ReferenceCache
from uft_ds.training.step import run_step

OBJECTIVE = Objective(
    {
        "instruction": KindObjective({"nll": 1.0}, weight=0.5),
        "score": KindObjective({"mse": 1.0}, beta=0.1),
        "binary": KindObjective({"bce": 0.5, "l1": 0.5}, weight=2.0, beta=0.05),
        "pair": KindObjective({"dpo": 1.0, "nll": 0.2, "raw": 0.3}, beta=0.2),
    },
    undesirable_weight=0.7,
)
SHIFTS: tuple[ShiftName, ...] = ("none", "constant", "ema", "kl", "prompt_mean")
BEFORE = 0.3
"""The running mean that the step starts with."""


def mixed_step() -> Step:
    """Three pairs, whose two sides share a prompt, and three responses of each other kind."""
    rng = np.random.default_rng(2)  # mismatched responses are rewarded here: the kl shift is not cut off at 0
    sequences: list[Sequence] = []

    def add(prompt: np.ndarray, length: int, kind: Kind, score: float, pair_id: int | None = None) -> None:
        tokens = np.concatenate([prompt, rng.integers(3, VOCAB_SIZE, size=length)]).astype(np.int32)
        response = Response(len(prompt), len(tokens), score, kind, f"toy:{len(sequences)}", pair_id)
        sequences.append(Sequence(tokens, (response,)))

    def prompt() -> np.ndarray:
        return rng.integers(3, VOCAB_SIZE, size=int(rng.integers(4, 12)))

    for number in range(3):
        shared = prompt()
        add(shared, int(rng.integers(5, 25)), "pair", 0.9, number)
        add(shared, int(rng.integers(5, 25)), "pair", 0.2, number)
        add(prompt(), int(rng.integers(5, 25)), "instruction", 1.0)
        add(prompt(), int(rng.integers(5, 25)), "score", 0.3 + 0.2 * number)
        add(prompt(), int(rng.integers(5, 25)), "binary", float(number % 2))
    return Step(0, tuple(sequences))


def shifted(name: ShiftName) -> Objective:
    return replace(OBJECTIVE, shift=RewardShift(name, value=0.25, decay=0.75))


def one_step(folder: Path, name: ShiftName, tokens: int, mode: str) -> Any:
    """Gradients, metrics and the next shift of one step through the real engine."""
    from deepspeed.utils import safe_get_full_grad

    engine = engine_of(folder)
    grads: dict[str, torch.Tensor] = {}
    update = engine.step

    def recording(rate: float) -> Any:
        named = engine.module.named_parameters()
        grads.update({n: safe_get_full_grad(p).clone() for n, p in named if p.requires_grad})
        return update(rate)

    engine.step = recording  # type: ignore[method-assign]
    cache = ReferenceCache("remembered" if mode == "remembered" else "live")
    outcome = run_step(engine, shifted(name), mixed_step(), 1e-3, tokens, cache, BEFORE)
    return grads, outcome.metrics, outcome.shift


def definition(folder: Path, name: ShiftName) -> tuple[dict[str, torch.Tensor], float, list[float]]:
    """One process, no DeepSpeed, a unit at a time; the shifts by hand from each response's reward."""
    model, step, objective = toy_model(folder), mixed_step(), shifted(name)

    def reward(sequence: Sequence) -> float:
        with torch.no_grad():
            policy_R, reference_R = model(micro_batch([replace(sequence)]))
        return objective.of_kind[sequence.responses[0].kind].beta * float(policy_R - reference_R)

    pointwise = [sequence for sequence in step.sequences if sequence.responses[0].kind != "instruction"]
    shifts = dict.fromkeys(map(id, step.sequences), 0.0)
    number = {"constant": 0.25, "ema": BEFORE}.get(name, 0.0)
    if name == "kl":
        rewards = []
        for place, own in enumerate(pointwise):
            # The two sides of a pair stand side by side: the chosen one's next is the rejected one, of the same prompt.
            other = (pointwise * 2)[place + (2 if own.pair_id == (pointwise * 2)[place + 1].pair_id is not None else 1)]
            start, response = own.responses[0].start, other.responses[0]
            tokens = np.concatenate([own.token_ids_T[:start], other.token_ids_T[response.start :]])
            if len(tokens) <= max(sequence.num_tokens for sequence in pointwise):
                rewards.append(reward(Sequence(tokens, (Response(start, len(tokens), 0.0, response.kind),))))
        assert len(rewards) > 6
        number = max(0.0, sum(rewards) / len(rewards))
    if number:
        shifts |= {id(sequence): number for sequence in pointwise}
    if name == "prompt_mean":
        for pair_id in range(3):
            sides = [sequence for sequence in pointwise if sequence.pair_id == pair_id]
            mean = sum(map(reward, sides)) / 2
            shifts |= {id(side): mean for side in sides}
    terms = count_terms(objective, step.responses)
    total = 0.0
    for unit in step.units:
        batch = micro_batch(unit)
        shifts_R = torch.tensor([shifts[id(sequence)] for sequence in unit])
        loss, _ = micro_batch_loss(objective, batch, terms, *model(batch), shifts_R)
        loss.backward()
        total += float(loss.detach())
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    return grads, total, [shifts[id(sequence)] for sequence in pointwise]


def steps(folder: Path, cases: list[tuple[ShiftName, int, str]]) -> Any:
    """Starting processes takes most of the time: each runs all cases."""
    return [one_step(folder, *case) for case in cases]


CASES: dict[int, list[tuple[ShiftName, int, str]]] = {
    1: [("prompt_mean", 512, "live"), ("kl", 512, "remembered")],
    2: [(name, 64, "live") for name in SHIFTS],
    4: [("kl", 64, "live"), ("prompt_mean", 64, "remembered"), ("ema", 64, "live"), ("constant", 64, "live")],
}


@pytest.mark.parametrize("world_size", [pytest.param(n, marks=pytest.mark.long) if n == 2 else n for n in CASES])
def test_a_mixed_step_does_not_depend_on_who_holds_what(tiny_qwen2: Path, world_size: int) -> None:
    """Gradients and loss on 1, 2 and 4 ZeRO-3 ranks in few or many micro-batches are one process's, to 1e-5."""
    for outcomes in run_on_ranks(steps, world_size, tiny_qwen2, CASES[world_size]):
        for (name, *_), outcome in zip(CASES[world_size], outcomes, strict=True):
            assert_is_the_definition(definition(tiny_qwen2, name), name, *outcome)


def assert_is_the_definition(
    expectation: tuple[dict[str, torch.Tensor], float, list[float]],
    name: ShiftName,
    grads: dict[str, torch.Tensor],
    metrics: dict[str, float],
    following: float,
) -> None:
    expected, total, shifts = expectation
    if name in ("kl", "prompt_mean"):
        assert max(map(abs, shifts)) > 1e-3, "the case should shift something"
    assert metrics["loss"] == pytest.approx(total, rel=1e-5)
    assert set(grads) == set(expected)
    for parameter, grad in expected.items():
        assert (grads[parameter] - grad).abs().max() <= 2e-5 * grad.abs().max(), (name, parameter)
    if name != "none":
        assert metrics["reward_shift"] == pytest.approx(np.mean(shifts), abs=1e-6)
    if name == "ema":
        rewards = [metrics[f"implicit_reward/{kind}"] for kind in ("score", "binary", "pair")]
        mean = (3 * rewards[0] + 3 * rewards[1] + 6 * rewards[2]) / 12
        assert following == pytest.approx(0.75 * BEFORE + 0.25 * mean, abs=1e-6)
    assert metrics["responses/pair"] == 6
    assert metrics["reference/computed"] == 15


def evaluated(folder: Path, name: ShiftName, num_groups: int) -> Any:
    """Metrics and table of the step's units as held-out data in so many groups."""
    engine, units = engine_of(folder), list(mixed_step().units)
    groups = [
        Step(number, tuple(sequence for unit in units[number::num_groups] for sequence in unit))
        for number in range(num_groups)
    ]
    return evaluate(engine, shifted(name), groups, 64, ReferenceCache("live"), BEFORE)


def evaluated_both_ways(folder: Path) -> Any:
    return [(evaluated(folder, name, 1), evaluated(folder, name, 5)) for name in ("kl", "prompt_mean")]


def test_held_out_groups_play_no_part(tiny_qwen2: Path) -> None:
    """In one group or in five, on two ranks: the same metrics, and every pair is its own."""
    for results in run_on_ranks(evaluated_both_ways, 2, tiny_qwen2):
        for (whole, table, origins), (grouped, *_) in results:
            assert grouped == pytest.approx(whole, rel=1e-5, abs=1e-6)
            assert whole["held_out/responses/pair"] == 6
            assert sorted(origins) == sorted(response.origin for response in mixed_step().responses)
            assert len(np.unique(table["pair"][table["pair"] >= 0])) == 3
        assert results[0][0][1]["shift"].max() == pytest.approx(BEFORE), "kl: the number of the step before"
