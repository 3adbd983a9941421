"""What we write as a universal checkpoint is what DeepSpeed's own engine loads, around a plain PEFT model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engines import Heard, at, trained, writer_of
from ranks import run_on_ranks
from tiny import build_tiny_model
from toy import toy_policy

from uft_ds.checkpoint.shard_names import shard_name
from uft_ds.checkpoint.shards import Shards, write_shard
from uft_ds.engine.optimizer_state import Piece
from uft_ds.errors import UserError
from uft_ds.export.universal import write_universal
from uft_ds.known.cache import Known
from uft_ds.recipe.schema import TrainSection
from uft_ds.recipe.to_settings import train_settings

NAMES = ("fp32", "exp_avg", "exp_avg_sq")


def state_of(module: Any) -> dict[str, list[torch.Tensor]]:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    return {
        name: [
            safe_get_full_fp32_param(p).clone(),
            *(safe_get_full_optimizer_state(p, key).clone() for key in NAMES[1:]),
        ]
        for name, p in module.named_parameters()
        if p.requires_grad
    }


def saved(base: Path, folder: Path) -> Any:
    engine = trained(base, steps=2)
    writer = writer_of(engine, folder, Heard())
    writer.start(at(2), Known.of_reference("lockstep"))
    writer.finish()
    return state_of(engine.module)


def loaded_by_deepspeed(base: Path, folder: Path, stage: int) -> Any:
    """By nothing of ours."""
    import deepspeed

    policy = toy_policy(base)
    trainable = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "checkpoint": {"load_universal": True},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.AdamW(trainable, lr=1e-3)
    engine, *_ = deepspeed.initialize(model=policy, optimizer=optimizer, config=config)
    path, _ = engine.load_checkpoint(str(folder), load_module_strict=False)
    steps = {float(state["step"]) for state in engine.optimizer.optimizer.state.values()}
    return path, state_of(engine.module), steps, engine.global_steps


@pytest.mark.parametrize(
    ("stage", "ranks"), [(3, 1), *(pytest.param(*of, marks=pytest.mark.long) for of in [(3, 2), (2, 2)])]
)
def test_deepspeed_loads_it(tmp_path: Path, stage: int, ranks: int) -> None:
    """Weights, moments and counts, at another number of ranks and another stage."""
    base = build_tiny_model(tmp_path / "base", "qwen2", tied=False)
    expected = run_on_ranks(saved, 2, base, tmp_path / "run")[0]
    write_universal(
        tmp_path / "run" / "checkpoints" / "step-000002", train_settings(TrainSection()), tmp_path / "universal"
    )
    for path, found, steps, global_steps in run_on_ranks(
        loaded_by_deepspeed, ranks, base, tmp_path / "universal", stage
    ):
        assert path is not None
        assert steps == {2.0}
        assert global_steps == 2
        assert set(found) == {name.removeprefix("policy.") for name in expected}
        for name, tensors in expected.items():
            for ours, theirs in zip(found[name.removeprefix("policy.")], tensors, strict=True):
                assert torch.equal(ours, theirs)


def test_names_are_no_paths(tmp_path: Path) -> None:
    """A file that would write elsewhere is refused."""
    (tmp_path / "checkpoint" / "optimizer").mkdir(parents=True)
    for name in ("policy.../../out", "/out", "a/b", "..", "a..b"):
        piece = Piece(name, (2,), 0, {key: torch.zeros(2) for key in ("master", "exp_avg", "exp_avg_sq")})
        write_shard(tmp_path / "checkpoint" / "optimizer" / shard_name(0, 1), [piece], {})
        with pytest.raises(UserError, match="not the name of a parameter"):
            Shards(tmp_path / "checkpoint" / "optimizer")
