"""Invariant 9 under ZeRO-3: five streams in one visit of partitioned weights, two of them trained, on two ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engines import engine_of
from ranks import run_on_ranks
from suites import long_but
from tiny import CLASSES, Architecture, build_tiny_model
from torch import Tensor
from toy import streams_of, toy_model, toy_step

from uft_ds.data.micro_batch import MicroBatch, micro_batch
from uft_ds.streams.stream import SCORING, Output, Stream

FURTHER = (Stream("third", "third"), SCORING, Stream("value", "value", trained=True, head="scalar"))
ON_RANKS_TOO = sorted(set(CLASSES) - {"qwen2", "gemma3_text"})
NAMES = ("policy", "reference", "third", "reward", "value")


def batch_of(rank: int) -> MicroBatch:
    return micro_batch(toy_step().sequences[rank::2])


def total(outputs: dict[str, Output]) -> Tensor:
    """A number that depends on every token of the policy and every value, each weighted otherwise."""
    numbers = (outputs["policy"].token_logps_N, outputs["value"].values_R)
    return torch.stack([(x_N * torch.linspace(-1, 1, len(x_N))).sum() for x_N in numbers if x_N is not None]).sum()


def on_a_rank(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], set[str]]:
    """What each stream gives, the gradients over all ranks, and the names of the weights that a step moves."""
    from deepspeed.utils import safe_get_full_grad

    engine = engine_of(folder, further=FURTHER, gradient_checkpointing=True)
    with engine.gathered_trainable() as named:
        before = {name: tensor.clone() for name, tensor in named.items()}
    outputs = engine(batch_of(engine.rank), [engine.streams[name] for name in NAMES])
    engine.backward(total(outputs), is_last=True)
    grads = {n: safe_get_full_grad(p).clone() for n, p in engine.module.named_parameters() if p.requires_grad}
    assert not engine.step(1e-2).skipped
    with engine.gathered_trainable() as named:
        moved = {name for name, tensor in named.items() if not torch.equal(tensor, before[name])}
    detached = {k: [None if x is None else x.detach() for x in output] for k, output in outputs.items()}
    return detached, grads, moved


@pytest.mark.parametrize("architecture", long_but(["gemma3_text"], ["qwen2", "gemma3_text", *ON_RANKS_TOO]))
def test_invariant_9_streams_of_partitioned_weights_equal_separate_forwards(
    tmp_path: Path, architecture: Architecture
) -> None:
    """Policy, bare base, a frozen adapter, a frozen and a trained scorer on two ranks: each output is bit for bit that
    of a forward of its own in one process without DeepSpeed; gradients of both trained streams are one process's to
    1e-5."""
    folder = build_tiny_model(tmp_path, architecture, tied=architecture.startswith("gemma"))
    model = toy_model(folder, further=FURTHER)
    for rank in range(2):
        outputs = model(batch_of(rank), streams_of(model, "policy")) | model(batch_of(rank), streams_of(model, "value"))
        total(outputs).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert any("scores.value" in name for name in expected)
    for rank, (outputs, grads, moved) in enumerate(run_on_ranks(on_a_rank, 2, folder)):
        for name in NAMES:
            alone = model(batch_of(rank), streams_of(model, name))[name]
            for found, theirs in zip(outputs[name], alone, strict=True):
                assert (found is None) == (theirs is None)
                assert found is None or torch.equal(found, theirs), name
        assert set(grads) == set(expected) == moved
        for name, grad in expected.items():
            assert (grads[name] - grad).abs().max() <= 1e-5 * grad.abs().max(), name
