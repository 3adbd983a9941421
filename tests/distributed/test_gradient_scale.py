"""Invariant 2: the gradient of a step does not depend on world size, micro-batches or packing."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import pytest
import torch
from engines import (
    REAL_PARTITIONING,
    UNEVEN,
    accumulate,
    assert_same_step,
    engine_of,
    recorded_gradients,
    single_process,
)
from ranks import run_on_ranks
from suites import long_but
from tiny import VOCAB_SIZE
from toy import UFT, both, build, forwarded, objective, toy_model, toy_step

from uft_ds.data.example import ONLINE, Kind, Response, Sequence
from uft_ds.data.micro_batch import micro_batch
from uft_ds.data.mixture import Step
from uft_ds.data.packing import rank_micro_batches
from uft_ds.engine.deepspeed_file import deepspeed_config, read_deepspeed_file
from uft_ds.engine.engine import Engine, partitioned_loading
from uft_ds.errors import CheckFailed
from uft_ds.known.cache import Known
from uft_ds.objectives.objective import KindObjective, Objective, count_terms, micro_batch_loss
from uft_ds.streams.load import decoder_layer_class
from uft_ds.training.evaluate import evaluate
from uft_ds.training.forwarding import Method
from uft_ds.training.step import run_step


def sharded_step(folder: Path, loss: str, tokens: int, assignment: list[list[list[int]]] | None, file: str) -> object:
    engine = engine_of(folder, file=file)
    step = toy_step()
    if assignment is None:
        batches = rank_micro_batches(
            step, tokens_per_micro_batch=tokens, rank=engine.rank, world_size=engine.world_size
        )
    else:
        batches = [micro_batch([step.sequences[i] for i in members]) for members in assignment[engine.rank]]
    grads, total = accumulate(engine, batches, objective(loss))
    result = engine.step(1e-3)
    assert not result.skipped
    return grads, total, result.grad_norm, [len(batch.responses) for batch in batches]


@pytest.mark.parametrize("world_size", long_but([1, 2], [1, 2, 4]))
def test_gradient_does_not_depend_on_world_size(tiny_qwen2: Path, world_size: int) -> None:
    """Gradients and their norm on 1, 2, 4 ZeRO-3 ranks, unevenly filled, equal one process's to 1e-5 relative."""
    definition = single_process(tiny_qwen2, "mse")
    results = run_on_ranks(sharded_step, world_size, tiny_qwen2, "mse", 0, UNEVEN[world_size], "zero3_cpu")
    assert any(0 in counts for *_, counts in results), "the case should hold an empty micro-batch"
    for result in results:
        assert_same_step(result, definition)


@pytest.mark.long
@pytest.mark.parametrize(("loss", "file"), [("nll", "zero3_cpu"), ("bce", "zero2")])
def test_gradient_does_not_depend_on_packing(tiny_qwen2: Path, loss: str, file: str) -> None:
    """Packed by `pack` into many micro-batches: the same gradients, for token terms and under ZeRO-2 too."""
    definition = single_process(tiny_qwen2, loss)
    results = run_on_ranks(sharded_step, 2, tiny_qwen2, loss, 64, None, file)
    assert min(len(counts) for *_, counts in results) > 1
    for result in results:
        assert_same_step(result, definition)


def step_of_prompts(folder: Path, share_prompts: bool, options: dict[str, Any]) -> object:
    """A step with several answers to one prompt, and the number of tokens of this rank's rows."""
    engine = engine_of(folder, attention="packed", share_prompts=share_prompts, **options)
    first, *others = toy_step().sequences
    answers = []
    for number in range(4):
        tokens = first.token_ids_T.copy()
        tokens[first.prompt_tokens :] = tokens[first.prompt_tokens :][::-1] if number % 2 else number + 5
        answers.append(Sequence(tokens, first.responses))
    step = Step(0, (*answers, *others))
    batches = engine.micro_batches(step, 128)
    grads, total = accumulate(engine, batches, UFT, step)
    return grads, total, engine.step(1e-3).grad_norm, sum(len(batch.token_ids_T) for batch in batches)


@pytest.mark.long
@pytest.mark.parametrize("options", [{}, {"sequence_size": 2}], ids=["whole rows", "divided rows"])
def test_gradient_does_not_depend_on_sharing_of_prompts(tiny_qwen2: Path, options: dict[str, Any]) -> None:
    """On two ZeRO-3 ranks, each adapter's gradient to 1e-5, from fewer tokens; also where both compute each row."""
    alone = run_on_ranks(step_of_prompts, 2, tiny_qwen2, False, {})
    shared = run_on_ranks(step_of_prompts, 2, tiny_qwen2, True, options)
    grads, total, norm, _ = alone[0]
    for result in shared:
        assert_same_step(result, (grads, total, norm))
    of_rows = [tokens for *_, tokens in shared][:: options.get("sequence_size", 1)]
    saved = sum(tokens for *_, tokens in alone) - sum(of_rows)
    assert saved >= 2 * toy_step().sequences[0].prompt_tokens


# ---- groups of answers that are compared with each other

SIZES = (4, 3, 2, 4)
"""Answers to each prompt. All answers to the third one have the same score."""
BETA = 0.2
COMPARED: Mapping[str, Objective] = {
    name: Objective(
        {
            "instruction": KindObjective({"mse": 1.0}, weight=0.5, beta=BETA),
            "score": KindObjective({"mse" if name == "center" else name: 1.0}, weight=2.0, beta=BETA),
            "binary": KindObjective({"nll": 1.0}),
            "pair": KindObjective({"nll": 1.0}),
        },
        center="prompt" if name == "center" else "none",
    )
    for name in ("center", "rloo", "reinforce", "grpo")
}


def step_of_answers() -> Step:
    """The policy's answers to four prompts, in turn, and two instructions, one to a prompt of the policy's."""
    rng = np.random.default_rng(3)
    prompts = [rng.integers(3, VOCAB_SIZE, size=size) for size in (4, 9, 6, 7, 5)]
    made: list[tuple[int, int, Sequence]] = []

    def add(place: int, number: int, kind: Kind, score: float) -> None:
        tokens = np.concatenate([prompts[number], rng.integers(3, VOCAB_SIZE, size=int(rng.integers(4, 20)))])
        facts = {ONLINE: 1.0} if kind == "score" else {}
        response = Response(
            len(prompts[number]), len(tokens), score, kind, f"{kind}:{number}.{place}", other_facts=facts
        )
        made.append((place, number, Sequence(tokens.astype(np.int32), (response,))))

    for number, size in enumerate(SIZES):
        for place in range(size):
            add(place, number, "score", 0.3 if number == 2 else round(float(rng.random()), 2))
    add(1, 4, "instruction", 1.0)
    add(2, 0, "instruction", 1.0)
    return Step(0, tuple(sequence for *_, sequence in sorted(made, key=lambda item: item[:2])))


class ByHand(NamedTuple):
    """A step by its formulas.

    size: the sum of the terms' absolute values. Terms -A log pi have both signs and cancel, so the loss is rounded as
    its terms are, not as its own value. advantage: the policy's mean |A|.
    """

    grads: dict[str, torch.Tensor]
    loss: float
    size: float
    advantage: float


@cache
def step_by_hand(folder: Path, name: str) -> ByHand:
    """One process, an answer at a time, formulas in float64."""
    model, step = toy_model(folder), step_of_answers()
    ratios, logps = [], []
    for sequence in step.sequences:
        policy_R, reference_R = both(model, micro_batch([sequence]))
        logps.append(policy_R[0])
        ratios.append(policy_R[0] - reference_R[0].detach())
    responses = step.responses
    own = [i for i, response in enumerate(responses) if response.is_online]
    groups: dict[str, list[int]] = {}
    for i in own:
        groups.setdefault("all" if name == "reinforce" else responses[i].origin.partition(".")[0], []).append(i)
    losses, advantages = [], []
    for i in (i for i, response in enumerate(responses) if response.kind == "instruction"):
        losses.append(0.5 * (torch.sigmoid(BETA * ratios[i]) - 1.0).square())
    of_center = name == "center"
    for members in groups.values():
        scores = np.array([responses[i].score for i in members])
        nats = np.array([float(ratios[i].detach()) for i in members])
        k = len(members)
        for place, i in enumerate(members):
            above, over = scores[place] - scores.mean(), nats[place] - nats.mean()
            if of_center:
                target = 0.5 + above
                losses.append(2.0 * (torch.sigmoid(BETA * (ratios[i] - nats.mean())) - target).square())
                advantages.append(above)
                continue
            factor = 1.0 if name == "reinforce" else k / (k - 1)
            of_scores = above / (scores.std(ddof=1) + 1e-4) if name == "grpo" else factor * above
            advantages.append(of_scores - factor * BETA * over)
            losses.append(-2.0 * advantages[-1] * logps[i])
    # mse serves both kinds under `center`: one number of terms. Else each loss has its own.
    numbers = [len(losses)] * len(losses) if of_center else [2] * 2 + [len(own)] * len(own)
    terms = torch.stack([loss / number for loss, number in zip(losses, numbers, strict=True)])
    terms.sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    terms = terms.detach()
    return ByHand(grads, float(terms.sum()), float(terms.abs().sum()), float(np.abs(advantages).mean()))


def answers_step(engine: Engine, name: str, tokens: int) -> Any:
    """Gradients and metrics of a step, the number of its forwards and of its micro-batches, and what this rank held.

    The step's rate is 0, so the next case finds the same weights.
    """
    call = engine.deepspeed.forward
    held: list[set[str]] = []

    def counting(batch: Any, *args: Any, **options: Any) -> Any:
        held.append({response.origin for response in batch.responses})
        return call(batch, *args, **options)

    step = step_of_answers()
    method = Method(engine, COMPARED[name], Known.of_reference("lockstep"), tokens)
    num_batches = len(engine.micro_batches(step, tokens))
    with recorded_gradients(engine) as grads, patch.object(engine.deepspeed, "forward", counting):
        metrics = run_step(method, step, 0.0).metrics
    return grads, metrics, len(held), num_batches, set().union(*held[-num_batches:])


def answers_steps(folder: Path, cases: list[tuple[str, int, bool]], sequence_size: int = 1) -> Any:
    """Starting processes and engines takes most of the time: each runs all cases that it can."""
    engines = {
        share: engine_of(folder, attention="packed", share_prompts=share, sequence_size=sequence_size)
        for share in {case[2] for case in cases}
    }
    return [answers_step(engines[share_prompts], name, tokens) for name, tokens, share_prompts in cases]


DIVIDED = [(name, 48, share_prompts) for name in COMPARED for share_prompts in (False, True)]
WHOLE = [(name, 512, share_prompts) for name in COMPARED for share_prompts in (False, True)]


@pytest.mark.parametrize("ranks", long_but([(2, 1)], [(1, 1), (2, 1), (4, 1), (4, 2)]), ids=str)
def test_gradient_does_not_depend_on_who_holds_a_group(tiny_qwen2: Path, ranks: tuple[int, int]) -> None:
    """Answers to a prompt on several ranks and in several micro-batches: one process's gradients, to 2e-5.

    With and without sharing of prompts, which keeps a group together only as far as a micro-batch holds it; also where
    two ranks compute each row, with half the tokens each.
    """
    world_size, sequence_size = ranks
    cases = [(name, tokens // sequence_size, share_prompts) for name, tokens, share_prompts in DIVIDED]
    results = run_on_ranks(answers_steps, world_size, tiny_qwen2, cases, sequence_size)
    for case, (name, *_) in enumerate(cases):
        expectation = step_by_hand(tiny_qwen2, name)
        data_ranks = results[::sequence_size]
        own = [{origin for origin in of_rank[case][4] if origin.startswith("score:0")} for of_rank in data_ranks]
        assert sum(map(len, own)) == SIZES[0]
        assert world_size == 1 or max(map(len, own)) < SIZES[0], "the case should divide a group over ranks"
        for of_rank in results:
            grads, metrics, forwards, num_batches, _ = of_rank[case]
            assert forwards > num_batches, "a divided group is forwarded ahead"
            assert_is_by_hand(expectation, name, grads, metrics)


@pytest.mark.long
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_whole_group_needs_no_forward_of_its_own(tiny_qwen2: Path, world_size: int) -> None:
    """If each group lies in one micro-batch: as many forwards as micro-batches, the same gradients.

    One rank has one micro-batch. On two, groups are whole only with prompts shared, and reinforce, which compares all
    answers of the step, has none that is.
    """
    for outcomes in run_on_ranks(answers_steps, world_size, tiny_qwen2, WHOLE):
        for case, (grads, metrics, forwards, num_batches, _) in zip(WHOLE, outcomes, strict=True):
            name, _, share_prompts = case
            assert_is_by_hand(step_by_hand(tiny_qwen2, name), name, grads, metrics)
            is_whole = world_size == 1 or (share_prompts and name != "reinforce")
            assert (forwards == num_batches) == is_whole, case


def assert_is_by_hand(expected: ByHand, name: str, grads: dict[str, torch.Tensor], metrics: dict[str, float]) -> None:
    assert metrics["loss"] == pytest.approx(expected.loss, rel=1e-5, abs=2e-6 * expected.size)
    assert metrics["advantage/score"] == pytest.approx(expected.advantage, rel=1e-5)
    assert metrics["flat_groups"] == (0.0 if name == "reinforce" else 0.25)
    assert metrics.get("centered/score") == (1.0 if name == "center" else None)
    assert set(grads) == set(expected.grads)
    for parameter, grad in expected.grads.items():
        assert (grads[parameter] - grad).abs().max() <= 2e-5 * grad.abs().max(), (name, parameter)


def refused_and_evaluated(folder: Path) -> Any:
    """Why a step is refused whose answer is alone; the metrics of answers that lie in two groups of held-out data."""
    engine = engine_of(folder)

    def method(name: str) -> Method:
        return Method(engine, COMPARED[name], Known.of_reference("lockstep"), 64)

    alone = Step(5, step_of_answers().sequences[:3])
    with pytest.raises(CheckFailed) as refusal:
        run_step(method("rloo"), alone, 1e-3)
    data = [
        Sequence(s.token_ids_T, tuple(Response(r.start, r.end, r.score, r.kind, r.origin) for r in s.responses))
        for s in step_of_answers().sequences
    ]
    groups = [Step(0, tuple(data[::2])), Step(1, tuple(data[1::2]))]
    answers = [s for s in data if s.responses[0].kind == "score"]
    return (
        str(refusal.value),
        evaluate(method("rloo"), groups).metrics,
        evaluate(method("rloo"), [Step(0, tuple(answers))]).metrics,
        evaluate(method("center"), groups),
    )


def test_answers_of_data_are_held_out(tiny_qwen2: Path) -> None:
    """Under rloo they have no loss, and all else; centred, they are compared over all groups of held-out data."""
    by_hand = step_by_hand(tiny_qwen2, "center")
    for refusal, of_rloo, of_answers, centered in run_on_ranks(refused_and_evaluated, 2, tiny_qwen2):
        assert "is the only answer to its prompt" in refusal
        assert "held_out/loss/score" not in of_rloo
        assert of_rloo["held_out/loss"] == pytest.approx(0.5 * of_rloo["held_out/loss/instruction"])
        assert {"held_out/rank_correlation/score", "held_out/log_ratio/score"} <= set(of_rloo)
        assert "held_out/loss" not in of_answers
        assert of_answers["held_out/log_ratio/score"] == pytest.approx(of_rloo["held_out/log_ratio/score"], rel=1e-4)
        assert centered.metrics["held_out/loss"] == pytest.approx(by_hand.loss, rel=1e-5)
        means = centered.rows["score_shift"][centered.rows["kind"] == 1] + 0.5
        assert len(set(np.round(means, 6))) == len(SIZES)


def poisoned_steps(folder: Path) -> object:
    """A good step; a step whose gradient is NaN on rank 1 only; a good step."""
    engine = engine_of(folder)
    step, terms = toy_step(), count_terms(UFT, toy_step().responses)
    batch = rank_micro_batches(step, tokens_per_micro_batch=512, rank=engine.rank, world_size=2)[0]
    outcomes, weights = [], []
    for poison in (False, True, False):
        loss, _ = micro_batch_loss(UFT, batch, terms, forwarded(engine, batch))
        engine.backward(loss * (float("nan") if poison and engine.rank == 1 else 1.0), is_last=True)
        outcomes.append(engine.step(1e-2))
        with engine.gathered_trainable() as named:
            weights.append({name: value.clone() for name, value in named.items()})
    return outcomes, weights


def clean_steps(folder: Path) -> object:
    """The same without the poisoned step."""
    engine = engine_of(folder)
    terms = count_terms(UFT, toy_step().responses)
    batch = rank_micro_batches(toy_step(), tokens_per_micro_batch=512, rank=engine.rank, world_size=2)[0]
    for _ in range(2):
        loss, _ = micro_batch_loss(UFT, batch, terms, forwarded(engine, batch))
        engine.backward(loss, is_last=True)
        engine.step(1e-2)
        with engine.evaluating():
            forwarded(engine, batch)  # leaves prefetched parameters in flight
        with engine.gathered_trainable() as named:
            assert all(value.numel() > 0 for value in named.values())
    with engine.gathered_trainable() as named:
        return {name: value.clone() for name, value in named.items()}


def test_a_nan_on_one_rank_skips_the_step_on_all(tiny_qwen2: Path) -> None:
    """Nothing moves on any rank, and nothing of the bad step is left in the next one, bit for bit."""
    results = run_on_ranks(poisoned_steps, 2, tiny_qwen2)
    clean = run_on_ranks(clean_steps, 2, tiny_qwen2)[0]
    for outcomes, weights in results:
        assert [outcome.skipped for outcome in outcomes] == [False, True, False]
        first, poisoned, last = weights
        assert all(torch.equal(first[name], poisoned[name]) for name in first)
        assert any(not torch.equal(first[name], last[name]) for name in first)
        assert all(torch.equal(last[name], clean[name]) for name in last)


def test_gradients_of_a_bfloat16_base_are_reduced_in_float32(tmp_path: Path) -> None:
    """Each micro-batch's gradient has the same bits on any rank; only their sum may differ, by float32's rounding.

    Reduced in the base's type, as DeepSpeed does by itself, they are 1e-3 off.
    """
    build(tmp_path / "model")
    alone, shared = (run_on_ranks(bfloat16_step, ranks, tmp_path / "model")[0] for ranks in (1, 2))
    for name, expected in alone.items():
        assert (shared[name] - expected).norm() <= 1e-5 * expected.norm(), name


def bfloat16_step(folder: Path) -> dict[str, torch.Tensor]:
    file = read_deepspeed_file("zero3_cpu")
    file["zero_optimization"] |= REAL_PARTITIONING
    config = deepspeed_config(file, dtype=torch.bfloat16, max_grad_norm=1e6)
    with partitioned_loading(config):  # otherwise DeepSpeed makes the adapters bfloat16 too
        model = toy_model(folder, dtype=torch.bfloat16)
    layer = decoder_layer_class(model.policy.get_base_model())
    engine = Engine(model, config, layer_class=layer, weight_decay=0.0)
    sequences = toy_step().sequences
    batches = [micro_batch([s]) for s in sequences[: len(sequences) // 2 * 2][engine.rank :: engine.world_size]]
    return accumulate(engine, batches, UFT)[0]
