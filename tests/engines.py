"""Engines of a toy model on a test's ranks, their steps, and what they save: shared by tests of the engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn
from toy import UFT, forwarded, logps_by_name, objective, toy_model, toy_step

from uft_ds.checkpoint.shard_names import shard_name
from uft_ds.checkpoint.shards import Shards, write_shard
from uft_ds.checkpoint.state import Position, TrainerState
from uft_ds.checkpoint.writer import CheckpointWriter
from uft_ds.data.micro_batch import MicroBatch, micro_batch
from uft_ds.data.mixture import Step
from uft_ds.data.packing import Packing, rank_micro_batches
from uft_ds.engine.deepspeed_file import deepspeed_config, read_deepspeed_file
from uft_ds.engine.engine import Engine, StepResult
from uft_ds.engine.groups import ParameterGroup, one_group
from uft_ds.engine.optimizer_state import Piece, pieces_of, restore
from uft_ds.objectives.objective import Objective, count_terms, micro_batch_loss
from uft_ds.record.run_folder import RunFolder
from uft_ds.streams.load import decoder_layer_class
from uft_ds.streams.policy import base_of

# Low enough that a tiny model is really partitioned and gathered again.
REAL_PARTITIONING = {
    "stage3_prefetch_bucket_size": 20000,
    "stage3_max_live_parameters": 40000,
    "stage3_max_reuse_distance": 100,
    "stage3_param_persistence_threshold": 0,
}

# Seven sequences by hand: different numbers of micro-batches' responses, and empty ones first, last and in a row.
UNEVEN = {
    1: [[[0], [1, 2, 3], [], [4, 5, 6]]],
    2: [[[0, 1, 2, 3], [], [4]], [[], [5, 6], []]],
    4: [[[0, 1, 2], [3]], [[], [4]], [[5], []], [[], [6]]],
}

BEFORE, AFTER = 2, 2  # steps of a run before it is saved, and after


def engine_of(
    folder: Path,
    *,
    file: str = "zero3_cpu",
    max_grad_norm: float = 1e6,
    weight_decay: float = 0.0,
    groups_of: Callable[[nn.Module], tuple[ParameterGroup, ...]] = one_group,
    share_prompts: bool = False,
    sequence_size: int = 1,
    **model: object,
) -> Engine:
    config = read_deepspeed_file(file)
    if file != "zero2":
        config["zero_optimization"] |= REAL_PARTITIONING
    uft_model = toy_model(folder, **model)  # type: ignore[arg-type]
    base = base_of(uft_model.policy)
    layer = decoder_layer_class(base)
    dtype = next(base.parameters()).dtype
    filled = deepspeed_config(config, dtype=dtype, max_grad_norm=max_grad_norm)
    groups = groups_of(uft_model)
    return Engine(
        uft_model,
        filled,
        layer_class=layer,
        weight_decay=weight_decay,
        packing=Packing(share_prompts=share_prompts, sequence_size=sequence_size),
        groups=groups,
    )


def full_gradients(engine: Engine) -> dict[str, torch.Tensor]:
    """Of all trained parameters by name, gathered; as they are before an update."""
    from deepspeed.utils import safe_get_full_grad

    return {n: safe_get_full_grad(p).clone() for n, p in engine.module.named_parameters() if p.requires_grad}


@contextmanager
def recorded_gradients(engine: Engine) -> Iterator[dict[str, torch.Tensor]]:
    """Within the block, the gradients that each update is made with, by name."""
    grads: dict[str, torch.Tensor] = {}
    update = engine.step

    def recording(rate: float, loss: torch.Tensor) -> StepResult:
        grads.update(full_gradients(engine))
        return update(rate, loss)

    with patch.object(engine, "step", recording):
        yield grads


def accumulate(
    engine: Engine, batches: list[MicroBatch], uft: Objective, step: Step | None = None
) -> tuple[dict[str, torch.Tensor], float]:
    """Gradients by name after the last micro-batch, and the step's loss over all ranks; by default of the toy step."""
    terms = count_terms(uft, (step or toy_step()).responses)
    total = torch.zeros(())
    for number, batch in enumerate(batches):
        loss, _ = micro_batch_loss(uft, batch, terms, forwarded(engine, batch))
        engine.backward(loss, is_last=number == len(batches) - 1)
        total += loss.detach()
    return full_gradients(engine), float(engine.sum_over_ranks(total))


def single_process(folder: Path, loss: str, **options: object) -> tuple[dict[str, torch.Tensor], float, float]:
    """The definition: one process, no DeepSpeed, every sequence forwarded alone."""
    model = toy_model(folder, **options)  # type: ignore[arg-type]
    step, uft = toy_step(), objective(loss)
    terms = count_terms(uft, step.responses)
    total = 0.0
    for sequence in step.sequences:
        batch = micro_batch([sequence])
        share, _ = micro_batch_loss(uft, batch, terms, logps_by_name(model, batch))
        share.backward()
        total += float(share.detach())
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    norm = torch.stack([grad.norm() for grad in grads.values()]).norm()
    return grads, total, float(norm)


def assert_same_step(sharded: tuple, definition: tuple) -> None:
    grads, total, norm, _ = sharded
    expected, expected_total, expected_norm = definition
    assert set(grads) == set(expected)
    for name, grad in expected.items():
        assert (grads[name] - grad).abs().max() <= 1e-5 * grad.abs().max(), name
    assert total == pytest.approx(expected_total, rel=1e-6)
    assert norm == pytest.approx(expected_norm, rel=1e-5)


def trained(base: Path, steps: int = 1) -> Engine:
    engine = engine_of(base)
    for _ in range(steps):
        batches = rank_micro_batches(
            toy_step(), tokens_per_micro_batch=64, rank=engine.rank, world_size=engine.world_size
        )
        accumulate(engine, batches, UFT)
        engine.step(1e-2)
    return engine


class Heard:
    """A reporter that remembers."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    warn = say


def writer_of(
    engine: Engine, folder: Path, heard: Heard, *, keep: int = 2, best: str | None = None
) -> CheckpointWriter:
    policy: Any = engine.module.policy
    return CheckpointWriter(engine, policy, RunFolder(folder), heard, keep=keep, best=best)


def at(step: int) -> Position:
    return Position(TrainerState(step, 0, 0.5), 100 * step)


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
