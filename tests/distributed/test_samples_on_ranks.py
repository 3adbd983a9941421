"""Answers while training: they change nothing, and they are those of the policy as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engines import accumulate, engine_of
from ranks import run_on_ranks
from tiny import IM_END, Architecture, build_tiny_model
from toy import UFT, toy_model, toy_sequences, toy_step

from uft_ds.data.packing import rank_micro_batches
from uft_ds.data.tokens.tokenize import load_tokenizer
from uft_ds.engine.engine import Engine
from uft_ds.record.samples import Sample
from uft_ds.streams.adapters import as_stream
from uft_ds.streams.packed_attention import attention_of_transformers
from uft_ds.streams.stream import POLICY
from uft_ds.training.samples import Prompt, Sampler, sample

NEW = 12


def sampler_of(folder: Path) -> Sampler:
    """Five prompts, two to three a rank and batch: on two ranks the second batch has no prompt for the other rank."""
    tokens = [sequence.token_ids_T[: 4 + 5 * n].tolist() for n, sequence in enumerate(toy_sequences(5, seed=3))]
    prompts = tuple(Prompt(tuple(ids), (65, IM_END), f"toy:{n}", "score", 0.5) for n, ids in enumerate(tokens))
    return Sampler(prompts, load_tokenizer(str(folder)), NEW, tokens_per_batch=2 * (24 + NEW))


def one_step(engine: Engine) -> tuple[Any, ...]:
    batches = rank_micro_batches(toy_step(), tokens_per_micro_batch=64, rank=engine.rank, world_size=engine.world_size)
    grads, loss = accumulate(engine, batches, UFT)
    result = engine.step(1e-2)
    return loss, result.grad_norm, grads


def training(folder: Path, file: str, samples: bool, mode: str) -> tuple[list[Any], dict[str, torch.Tensor], list[Any]]:
    """Three steps, with or without answers around each: what each step gave, the weights, the answers."""
    engine = engine_of(folder, file=file, reference_mode=mode)
    sampler, steps, answers = sampler_of(folder), [], []
    done: list[int] = []
    for number in range(4):
        before = torch.get_rng_state()
        if samples:
            answers.append(sample(engine, sampler, number, on_done=done.append))
        assert torch.equal(torch.get_rng_state(), before), "a generator was used"
        assert engine.module.training
        if number < 3:
            steps.append(one_step(engine))
    assert not samples or done[-1] == 5
    with engine.gathered_trainable() as weights:
        return steps, {name: weight.clone() for name, weight in weights.items()}, answers


def assert_same(found: Any, expected: Any) -> None:
    steps, weights, _ = found
    for (loss, norm, grads), (loss_then, norm_then, grads_then) in zip(steps, expected[0], strict=True):
        assert (loss, norm) == (loss_then, norm_then)
        assert all(torch.equal(grads[name], grads_then[name]) for name in grads_then)
    assert all(torch.equal(weights[name], expected[1][name]) for name in expected[1])


@pytest.mark.long  # with the answers of online runs it is fast: `test_builtin_generator.py`
@pytest.mark.parametrize(("file", "mode"), [("zero3_cpu", "lockstep"), ("zero2", "separate")])
def test_answers_change_no_bit_of_the_training(tmp_path: Path, file: str, mode: str) -> None:
    """Losses, norms, gradients and adapters of three steps on two ranks, with answers and without; no generator moves.

    The answers are the same on both ranks, and change as the policy does.
    """
    build_tiny_model(tmp_path)
    with_answers = run_on_ranks(training, 2, tmp_path, file, True, mode)
    without = run_on_ranks(training, 2, tmp_path, file, False, mode)
    for found, expected in zip(with_answers, without, strict=True):
        assert_same(found, expected)
    assert with_answers[0][2] == with_answers[1][2]
    first, *_, last = with_answers[0][2]
    assert [one.answer for one in first] != [one.answer for one in last]


def greedy(folder: Path, sampler: Sampler) -> list[tuple[str, bool]]:
    """The obvious loop: one process, one row, no padding, no cache, no DeepSpeed."""
    model = toy_model(folder)
    base: Any = model.policy.get_base_model().eval()
    found = []
    with torch.no_grad(), as_stream(base, POLICY), attention_of_transformers(base):
        for prompt in sampler.prompts:
            ids: list[int] = []
            while len(ids) < NEW and IM_END not in ids:
                ids.append(int(base(torch.tensor([[*prompt.token_ids, *ids]])).logits[0, -1].argmax()))
            text = sampler.chat.tokenizer.decode([token for token in ids if token != IM_END], skip_special_tokens=True)
            found.append((text.strip(), IM_END in ids))
    return found


def answers(folder: Path) -> list[Sample]:
    return sample(engine_of(folder), sampler_of(folder), 7)


@pytest.mark.parametrize(
    ("architecture", "ranks"),
    [
        pytest.param("llama", 1, marks=pytest.mark.long),
        ("llama", 2),
        pytest.param("gemma3_text", 2, marks=pytest.mark.long),
        pytest.param("gpt_neox", 2, marks=pytest.mark.long),
    ],
)
def test_answers_are_those_of_the_policy(tmp_path: Path, architecture: Architecture, ranks: int) -> None:
    """On one rank and on two under ZeRO-3, of prompts of uneven lengths, also past a sliding window: adapters on."""
    build_tiny_model(tmp_path, architecture)
    expected = greedy(tmp_path, sampler_of(tmp_path))
    for of_rank in run_on_ranks(answers, ranks, tmp_path):
        assert [(one.answer, one.ended) for one in of_rank] == expected
        assert [one.step for one in of_rank] == [7] * 5
        assert [one.origin for one in of_rank] == [f"toy:{n}" for n in range(5)]
        assert {one.response for one in of_rank} == {sampler_of(tmp_path).chat.tokenizer.decode([65])}
