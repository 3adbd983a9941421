"""What is saved of the optimiser puts a fresh engine exactly where the saved one stood, on any number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_on_ranks
from test_gradient_scale import accumulate, engine_of
from tiny import build_tiny_model
from toy import UFT, toy_step

from uft_ds.checkpoint.optimizer_state import Piece, pieces_of, restore
from uft_ds.checkpoint.shards import Shards, shard_name, write_shard
from uft_ds.data.packing import rank_micro_batches
from uft_ds.training.engine import Engine

BEFORE, AFTER = 2, 2


def train(engine: Engine, first: int, count: int) -> list[float]:
    losses = []
    for number in range(first, first + count):
        batches = rank_micro_batches(
            toy_step(), tokens_per_micro_batch=64, rank=engine.rank, world_size=engine.world_size
        )
        _, loss = accumulate(engine, batches, UFT)
        assert not engine.step(1e-2 / (number + 1)).skipped
        losses.append(loss)
    return losses


def updates_of(engine: Engine) -> set[int]:
    """AdamW's own count."""
    return {int(state["step"]) for state in engine.deepspeed.optimizer.optimizer.state.values()}


def weights(engine: Engine) -> dict[str, torch.Tensor]:
    with engine.gathered_trainable() as named:
        return {name: tensor.clone() for name, tensor in named.items()}


def saved_run(base: Path, folder: Path, file: str, model: dict[str, Any]) -> Any:
    engine = engine_of(base, file=file, max_grad_norm=0.5, **model)
    train(engine, 0, BEFORE)
    pieces = [
        Piece(p.name, p.shape, p.start, {k: t.cpu().clone() for k, t in p.tensors.items()})
        for p in pieces_of(engine._engine)
    ]
    assert updates_of(engine) == {BEFORE}
    write_shard(folder / shard_name(engine.rank, engine.world_size), pieces, {})
    return train(engine, BEFORE, AFTER), weights(engine)


def resumed_run(base: Path, folder: Path, file: str, model: dict[str, Any]) -> Any:
    # Other initial adapters: all of them must come from the files.
    engine = engine_of(base, file=file, max_grad_norm=0.5, **(model | {"b_std": 0.3}))
    shards = Shards(folder)
    restore(engine._engine, shards.read, updates=BEFORE)
    assert updates_of(engine) == {BEFORE}
    return train(engine, BEFORE, AFTER), weights(engine)


BF16 = {"dtype": torch.bfloat16, "lora_dtype": torch.bfloat16}


@pytest.mark.parametrize(
    ("file", "ranks", "model"),
    [
        ("zero3_cpu", 2, {}),
        pytest.param("zero3_cpu", 3, {"gradient_checkpointing": True}, marks=pytest.mark.long),
        pytest.param("zero3_cpu", 2, BF16, marks=pytest.mark.long),
        ("zero3_offload", 2, {}),
        ("zero2", 2, {}),
        pytest.param("zero2", 3, BF16, marks=pytest.mark.long),
    ],
)
def test_a_fresh_engine_goes_on_bit_for_bit(tmp_path: Path, file: str, ranks: int, model: dict[str, Any]) -> None:
    """Losses and weights of the steps after, at the same number of ranks."""
    base = build_tiny_model(tmp_path / "base", "qwen2", tied=False)
    expected = run_on_ranks(saved_run, ranks, base, tmp_path, file, model)
    for (losses, found), (straight, trained) in zip(
        run_on_ranks(resumed_run, ranks, base, tmp_path, file, model), expected, strict=True
    ):
        assert losses == straight
        assert all(torch.equal(found[name], trained[name]) for name in trained)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param(("zero3_cpu", 2), ("zero3_cpu", 1), marks=pytest.mark.long),
        (("zero2", 2), ("zero3_cpu", 4)),
        pytest.param(("zero3_cpu", 3), ("zero2", 2), marks=pytest.mark.long),
        (("zero3_cpu", 1), ("zero3_offload", 2)),
    ],
)
def test_other_ranks_and_stages_go_on(tmp_path: Path, before: tuple[str, int], after: tuple[str, int]) -> None:
    """Within rounding: sums over ranks are made in another order."""
    base = build_tiny_model(tmp_path / "base", "qwen2", tied=False)
    straight, trained = run_on_ranks(saved_run, before[1], base, tmp_path, before[0], {})[0]
    losses, found = run_on_ranks(resumed_run, after[1], base, tmp_path, after[0], {})[0]
    assert losses == pytest.approx(straight, rel=1e-5)
    for name, tensor in trained.items():
        assert (found[name] - tensor).abs().max() <= 1e-5 * tensor.abs().max() + 1e-6, name
