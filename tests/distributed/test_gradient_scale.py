"""Invariant 2: the gradient of a step does not depend on world size, micro-batches or packing."""

from pathlib import Path

import pytest
import torch
from engines import REAL_PARTITIONING, UNEVEN, accumulate, assert_same_step, engine_of, single_process
from ranks import run_on_ranks
from toy import UFT, build, forwarded, objective, toy_model, toy_step

from uft_ds.data.example import Sequence
from uft_ds.data.micro_batch import micro_batch
from uft_ds.data.mixture import Step
from uft_ds.data.packing import rank_micro_batches
from uft_ds.engine.deepspeed_file import deepspeed_config, read_deepspeed_file
from uft_ds.engine.engine import Engine, partitioned_loading
from uft_ds.objectives.objective import count_terms, micro_batch_loss
from uft_ds.streams.load import decoder_layer_class


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


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_gradient_does_not_depend_on_world_size(tiny_qwen2: Path, world_size: int) -> None:
    """Gradients and their norm on 1, 2, 4 ZeRO-3 ranks, unevenly filled, equal one process's to 1e-5 relative."""
    definition = single_process(tiny_qwen2, "mse")
    results = run_on_ranks(sharded_step, world_size, tiny_qwen2, "mse", 0, UNEVEN[world_size], "zero3_cpu")
    assert any(0 in counts for *_, counts in results), "the case should hold an empty micro-batch"
    for result in results:
        assert_same_step(result, definition)


@pytest.mark.parametrize(("loss", "file"), [("nll", "zero3_cpu"), ("bce", "zero2")])
def test_gradient_does_not_depend_on_packing(tiny_qwen2: Path, loss: str, file: str) -> None:
    """Packed by `pack` into many micro-batches: the same gradients, for token terms and under ZeRO-2 too."""
    definition = single_process(tiny_qwen2, loss)
    results = run_on_ranks(sharded_step, 2, tiny_qwen2, loss, 64, None, file)
    assert min(len(counts) for *_, counts in results) > 1
    for result in results:
        assert_same_step(result, definition)


def step_of_prompts(folder: Path, share_prompts: bool) -> object:
    """A step with several answers to one prompt, and the number of tokens that this rank forwards."""
    engine = engine_of(folder, attention="packed", share_prompts=share_prompts)
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


def test_gradient_does_not_depend_on_sharing_of_prompts(tiny_qwen2: Path) -> None:
    """On two ZeRO-3 ranks, each adapter's gradient to 1e-5, from fewer tokens."""
    alone, shared = (run_on_ranks(step_of_prompts, 2, tiny_qwen2, share) for share in (False, True))
    grads, total, norm, _ = alone[0]
    for result in shared:
        assert_same_step(result, (grads, total, norm))
    saved = sum(tokens for *_, tokens in alone) - sum(tokens for *_, tokens in shared)
    assert saved >= 2 * toy_step().sequences[0].prompt_tokens


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
