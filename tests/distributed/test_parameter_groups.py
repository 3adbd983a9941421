"""Two groups of parameters on sharded engines: each moves by its own rate, and a checkpoint holds both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engines import accumulate, engine_of, updates_of, weights
from ranks import run_on_ranks
from torch import nn
from toy import UFT, toy_step

from uft_ds.checkpoint.shard_names import shard_name
from uft_ds.checkpoint.shards import Shards, write_shard
from uft_ds.engine.engine import Engine
from uft_ds.engine.groups import ParameterGroup
from uft_ds.engine.optimizer_state import Piece, pieces_of, restore

RATES = {"A": 1e-3, "B": 1e-2}


def by_matrix(model: nn.Module) -> tuple[ParameterGroup, ...]:
    """LoRA's A and B matrices, B ten times as fast."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return tuple(
        ParameterGroup(which, tuple(p for name, p in named if f"lora_{which}" in name), RATES[which] / RATES["A"])
        for which in ("B", "A")
    )


def step(engine: Engine, rates: Any) -> None:
    accumulate(engine, engine.micro_batches(toy_step(), 64), UFT)
    assert not engine.step(rates).skipped


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> dict[str, float]:
    """The largest change of an element, by group."""
    changes = {name: float((after[name] - before[name]).abs().max()) for name in before}
    return {which: max(c for name, c in changes.items() if f"lora_{which}" in name) for which in ("A", "B")}


def grouped_run(base: Path, folder: Path, file: str) -> Any:
    engine = engine_of(base, file=file, groups_of=by_matrix)
    at = [weights(engine)]
    for rates in (RATES, {"A": 1e-2, "B": 0.0}):
        step(engine, rates)
        at.append(weights(engine))
    pieces = [
        Piece(p.name, p.shape, p.start, {k: t.cpu().clone() for k, t in p.tensors.items()})
        for p in pieces_of(engine.deepspeed)
    ]
    write_shard(folder / shard_name(engine.rank, engine.world_size), pieces, {})
    torch.distributed.barrier()
    resumed = engine_of(base, file=file, groups_of=by_matrix, b_std=0.3)  # other adapters: all comes from the files
    restore(resumed.deepspeed, Shards(folder).read, updates=2)
    assert updates_of(resumed) == {2}
    for one, rates in ((engine, RATES["A"]), (resumed, RATES)):  # by the run's rate, and by each group's own
        step(one, rates)
        step(one, rates)
    ours, theirs = weights(resumed), weights(engine)
    return (
        moved(at[0], at[1]),
        moved(at[1], at[2]),
        [name for name in ours if not torch.equal(ours[name], theirs[name])],
    )


@pytest.mark.parametrize("file", ["zero3_cpu", pytest.param("zero2", marks=pytest.mark.long)])
def test_two_groups_move_by_their_own_rates(tiny_qwen2: Path, tmp_path: Path, file: str) -> None:
    """AdamW's first step is the rate itself; a rate of 0 moves nothing; a resumed engine goes on bit for bit."""
    for first, second, different in run_on_ranks(grouped_run, 2, tiny_qwen2, tmp_path, file):
        assert first == pytest.approx(RATES, rel=1e-2)
        assert second["A"] > 1e-3
        assert second["B"] == 0.0
        assert different == []
