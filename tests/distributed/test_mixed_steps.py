"""Invariant 2 for steps that mix kinds, losses and pairs, under every shift: who holds what plays no part."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import engine_of, recorded_gradients
from ranks import run_on_ranks
from tiny import VOCAB_SIZE
from toy import both, logps_by_name, toy_model

from uft_ds.data.example import Kind, Response, Sequence
from uft_ds.data.micro_batch import MicroBatch, micro_batch
from uft_ds.data.mixture import Step
from uft_ds.engine.engine import Engine
from uft_ds.known.cache import Known
from uft_ds.objectives.baselines import Baselines
from uft_ds.objectives.objective import KindObjective, Objective, count_terms, micro_batch_loss
from uft_ds.objectives.reference import HowReference
from uft_ds.objectives.reward_shift import RewardShift, ShiftName
from uft_ds.streams.stream import Stream
from uft_ds.training.evaluate import evaluate
from uft_ds.training.forwarding import Method
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
"""The running mean that the step starts with, nats."""


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


def one_step(
    engine: Engine, name: ShiftName, tokens: int, mode: HowReference, objective: Objective | None = None
) -> Any:
    """Gradients, metrics and the next shift of one step, at a rate of 0: the next case finds the same weights."""
    method = Method(engine, objective or shifted(name), Known.of_reference(mode), tokens)
    with recorded_gradients(engine) as grads:
        outcome = run_step(method, mixed_step(), 0.0, BEFORE)
    return grads, outcome.metrics, outcome.shift


@cache
def definition(folder: Path, name: ShiftName) -> tuple[dict[str, torch.Tensor], float, list[float]]:
    """One process, no DeepSpeed, a unit at a time; the shifts by hand from each response's log-ratio."""
    model, step, objective = toy_model(folder), mixed_step(), shifted(name)

    def log_ratio(sequence: Sequence) -> float:
        with torch.no_grad():
            policy_R, reference_R = both(model, micro_batch([replace(sequence)]))
        return float(policy_R - reference_R)

    def beta(sequence: Sequence) -> float:
        return objective.of_kind[sequence.responses[0].kind].beta

    pointwise = [sequence for sequence in step.sequences if sequence.responses[0].kind != "instruction"]
    shifts = dict.fromkeys(map(id, step.sequences), 0.0)
    nats = BEFORE if name == "ema" else 0.0
    if name == "kl":
        ratios = []
        for place, own in enumerate(pointwise):
            # As many places further as the step has answers to the prompt: two for the sides of a pair.
            other = (pointwise * 2)[place + (1 if own.pair_id is None else 2)]
            start, response = own.responses[0].start, other.responses[0]
            tokens = np.concatenate([own.token_ids_T[:start], other.token_ids_T[response.start :]])
            if len(tokens) <= max(sequence.num_tokens for sequence in pointwise):
                ratios.append(log_ratio(Sequence(tokens, (Response(start, len(tokens), 0.0, response.kind),))))
        assert len(ratios) > 6
        nats = max(0.0, sum(ratios) / len(ratios))
    shifts |= {id(sequence): 0.25 if name == "constant" else beta(sequence) * nats for sequence in pointwise}
    if name == "prompt_mean":
        for pair_id in range(3):
            sides = [sequence for sequence in pointwise if sequence.pair_id == pair_id]
            mean = sum(map(log_ratio, sides)) / 2
            shifts |= {id(side): beta(side) * mean for side in sides}
    terms = count_terms(objective, step.responses)
    total = 0.0
    for unit in step.units:
        batch = micro_batch(unit)
        shifts_R = torch.tensor([shifts[id(sequence)] for sequence in unit])
        baselines = Baselines(shifts_R, batch.scores_R, torch.full_like(shifts_R, torch.nan))
        loss, _ = micro_batch_loss(objective, batch, terms, logps_by_name(model, batch), baselines)
        loss.backward()
        total += float(loss.detach())
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    return grads, total, [shifts[id(sequence)] for sequence in pointwise]


def steps(folder: Path, cases: list[tuple[ShiftName, int, HowReference]], options: dict[str, Any]) -> Any:
    """Starting processes and engines takes most of the time: each runs all cases."""
    engine = engine_of(folder, **options)
    return [one_step(engine, *case) for case in cases]


DIVIDED: dict[str, Any] = {"attention": "packed", "share_prompts": True, "sequence_size": 2}
"""Two ranks compute each row, in which the two sides of a pair share their prompt."""
CASES = [
    pytest.param(1, [("prompt_mean", 512, "lockstep"), ("kl", 512, "cached")], {}, marks=pytest.mark.long),
    (2, [("ema", 64, "lockstep"), ("prompt_mean", 64, "cached")], {}),
    pytest.param(2, [(name, 64, "lockstep") for name in SHIFTS], {}, marks=pytest.mark.long),
    pytest.param(
        4,
        [("kl", 64, "lockstep"), ("prompt_mean", 64, "cached"), ("ema", 64, "lockstep"), ("constant", 64, "lockstep")],
        {},
        marks=pytest.mark.long,
    ),
    pytest.param(2, [(name, 64, "lockstep") for name in SHIFTS], DIVIDED, marks=pytest.mark.long),
    pytest.param(4, [("kl", 32, "cached"), ("prompt_mean", 32, "lockstep")], DIVIDED, marks=pytest.mark.long),
]
NAMES = ["one rank", "two ranks", "every shift", "four ranks", "divided rows", "divided rows, four ranks"]


@pytest.mark.parametrize(("world_size", "cases", "options"), CASES, ids=NAMES)
def test_a_mixed_step_does_not_depend_on_who_holds_what(
    tiny_qwen2: Path, world_size: int, cases: list[tuple[ShiftName, int, HowReference]], options: dict[str, Any]
) -> None:
    """Gradients and loss on 1, 2 and 4 ZeRO-3 ranks in few or many micro-batches are one process's, to 2e-5."""
    for outcomes in run_on_ranks(steps, world_size, tiny_qwen2, cases, options):
        for (name, *_), outcome in zip(cases, outcomes, strict=True):
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
        ratios = [metrics[f"log_ratio/{kind}"] for kind in ("score", "binary", "pair")]
        mean = (3 * ratios[0] + 3 * ratios[1] + 6 * ratios[2]) / 12
        assert following == pytest.approx(0.75 * BEFORE + 0.25 * mean, abs=1e-6)
    assert metrics["responses/pair"] == 6
    assert metrics["reference/computed"] == 15


def held_out_step() -> Step:
    """The mixed step, and to a scored prompt of it another answer, far from the first."""
    step = mixed_step()
    scored = next(sequence for sequence in step.sequences if sequence.responses[0].kind == "score")
    (own,) = scored.responses
    tokens = np.concatenate([scored.token_ids_T[: own.start], scored.token_ids_T[: own.start - 1 : -1]])
    return Step(0, (*step.sequences, Sequence(tokens, (replace(own, score=0.9, origin="toy:another"),))))


def evaluated(engine: Engine, name: ShiftName, num_groups: int) -> Any:
    """Metrics and table of the units as held-out data in so many groups."""
    units = list(held_out_step().units)
    groups = [
        Step(number, tuple(sequence for unit in units[number::num_groups] for sequence in unit))
        for number in range(num_groups)
    ]
    return evaluate(Method(engine, shifted(name), Known.of_reference("lockstep"), 64), groups, BEFORE)


def evaluated_both_ways(folder: Path) -> Any:
    engine = engine_of(folder)
    return [(evaluated(engine, name, 1), evaluated(engine, name, 5)) for name in ("kl", "prompt_mean")]


def test_held_out_groups_play_no_part(tiny_qwen2: Path) -> None:
    """In one group or in five, on two ranks: the same metrics, and every pair is its own."""
    for results in run_on_ranks(evaluated_both_ways, 2, tiny_qwen2):
        for (whole, table, origins), (grouped, *_) in results:
            assert grouped == pytest.approx(whole, rel=1e-5, abs=1e-6, nan_ok=True)
            assert whole["held_out/responses/pair"] == 6
            assert sorted(origins) == sorted(response.origin for response in held_out_step().responses)
            assert len(np.unique(table["pair"][table["pair"] >= 0])) == 3
        assert results[0][0][1]["shift"].max() == pytest.approx(0.2 * BEFORE), "kl: the nats of the step before"
        prompt_means = results[1][1]
        answers = [origin.endswith("another") for origin in prompt_means.origins]
        assert prompt_means.rows["shift"][answers] != 0.0, "the two answers to one prompt lie in two groups"


REFERENCE_FREE = replace(
    OBJECTIVE,
    of_kind={
        "instruction": KindObjective({"nll": 1.0}, weight=0.5),
        "score": KindObjective({"nll": 1.0}),
        "binary": KindObjective({"nll_sum": 0.1}),
        "pair": KindObjective({"simpo": 1.0, "contrast": 0.5, "odds_ratio": 0.1, "nll": 1.0}, beta=2.0),
    },
)


def without_reference(folder: Path) -> Any:
    """Gradients and metrics of a step, and which of its forwards asked for the reference."""
    asked: list[bool] = []
    call = Engine.__call__

    def recording(engine: Engine, batch: MicroBatch, streams: Seq[Stream], **options: Any) -> Any:
        asked.append(any(stream.name == "reference" for stream in streams))
        return call(engine, batch, streams, **options)

    Engine.__call__ = recording  # type: ignore[method-assign]
    mode: HowReference = "lockstep" if REFERENCE_FREE.needs_reference else "none"  # as a run chooses it
    return *one_step(engine_of(folder), "none", 64, mode, REFERENCE_FREE)[:2], asked


def references_of_two_steps(folder: Path) -> Any:
    """Of two steps on the same data: responses whose reference was forwarded so far, and what the metrics say."""
    engine = engine_of(folder)
    method = Method(engine, shifted("prompt_mean"), Known.of_reference("cached"), 64)
    forwarded = 0

    def counting(batch: MicroBatch, streams: Seq[Stream], **options: Any) -> Any:
        nonlocal forwarded
        forwarded += len(batch.responses) if any(stream.name == "reference" for stream in streams) else 0
        return call(batch, streams, **options)

    call, engine.deepspeed.forward = engine.deepspeed.forward, counting
    found = []
    for _ in range(2):
        metrics = run_step(method, mixed_step(), 1e-3).metrics
        found.append((sum(engine.gather_objects(forwarded)), metrics["reference/computed"]))
    return found


@pytest.mark.long
def test_pairs_need_no_forward_ahead_of_the_step(tiny_qwen2: Path) -> None:
    """Under `prompt_mean` they are compared within their micro-batch, so each reference is forwarded once."""
    for found in run_on_ranks(references_of_two_steps, 2, tiny_qwen2):
        assert found == [(15, 15.0), (15, 0.0)]


def test_no_reference_is_forwarded_where_no_loss_compares_with_it(tiny_qwen2: Path) -> None:
    """SimPO, CPO's and ORPO's losses and likelihoods on two ranks: one process's gradients, from the policy alone."""
    model, step = toy_model(tiny_qwen2), mixed_step()
    terms, total = count_terms(REFERENCE_FREE, step.responses), 0.0
    for unit in step.units:
        batch = micro_batch(unit)
        loss, _ = micro_batch_loss(REFERENCE_FREE, batch, terms, logps_by_name(model, batch, "policy"))
        loss.backward()
        total += float(loss.detach())
    expected = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    for grads, metrics, asked in run_on_ranks(without_reference, 2, tiny_qwen2):
        assert len(asked) > 1
        assert not any(asked)
        assert metrics["reference/computed"] == 0
        assert metrics["loss"] == pytest.approx(total, rel=1e-5)
        assert {"pair_margin/pair", "pair_accuracy/pair", "logp_chosen/pair"} <= set(metrics)
        for name, grad in expected.items():
            assert (grads[name] - grad).abs().max() <= 2e-5 * grad.abs().max(), name
