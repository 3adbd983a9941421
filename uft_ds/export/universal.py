"""Write a run's checkpoint as a universal checkpoint of DeepSpeed, to continue training with DeepSpeed alone.

    TAG/zero/PARAMETER/{fp32,exp_avg,exp_avg_sq,step}.pt     whole tensors, by the names of a plain PEFT model
    TAG/zero/optimizer_state.pt                              the state that all parameters share
    TAG/[zero_pp_rank_0_]mp_rank_00_model_states.pt          counts; no weights
    latest, latest_universal

The layout is that of `deepspeed.checkpoint.ds_to_universal` (0.19.8); load it with
`{"checkpoint": {"load_universal": true}}`
and `load_module_strict=False`.
"""

from __future__ import annotations

import importlib.metadata
import math
from pathlib import Path
from typing import Any

import torch

from uft_ds.checkpoint.folder import OPTIMIZER, name_of
from uft_ds.checkpoint.shards import Shards
from uft_ds.checkpoint.state import read_position
from uft_ds.engine.optimizer_state import MASTER, MOMENTS
from uft_ds.recipe.settings import TrainSettings
from uft_ds.streams.policy import OF_POLICY

_VERSION = 0.2
"""universal_checkpoint_version of DeepSpeed 0.19."""


def write_universal(checkpoint: Path, settings: TrainSettings, out: Path) -> None:
    """Write the universal checkpoint below `out`, with one parameter in memory at a time.

    Raises:
        UserError: the checkpoint's optimiser state cannot be read.
    """
    state = read_position(checkpoint).state
    shards = Shards(checkpoint / OPTIMIZER)
    folder = out / name_of(state.step)
    step = torch.tensor(float(state.updates))
    for name, shape in shards.shapes.items():
        parameter = folder / "zero" / name.removeprefix(OF_POLICY)
        parameter.mkdir(parents=True)
        for ours, theirs in ((MASTER, "fp32"), *((key, key) for key in MOMENTS)):
            whole = shards.read(name, ours, 0, math.prod(shape)).view(shape)
            torch.save({"param": whole}, parameter / f"{theirs}.pt")
        torch.save(step, parameter / "step.pt")
    torch.save(_optimizer_state(settings, step), folder / "zero" / "optimizer_state.pt")
    for file in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"):
        torch.save(_counts(state.step, state.skipped_steps, settings, shards.world_size), folder / file)
    for file in ("latest", "latest_universal"):
        (out / file).write_text(folder.name, encoding="utf-8")


def _optimizer_state(settings: TrainSettings, step: torch.Tensor) -> dict[str, Any]:
    group = {
        "lr": settings.lr,
        "betas": settings.betas,
        "eps": 1e-8,
        "weight_decay": settings.weight_decay,
        "params": [0],
    }
    return {
        "optimizer_state_dict": {"state": {0: {"step": step}}, "param_groups": [group]},
        "param_groups": [group],
        "ds_version": importlib.metadata.version("deepspeed"),
        "dynamic_loss_scale": False,
        "overflow": False,
        "clip_grad": settings.max_grad_norm,
    }


def _counts(step: int, skipped: int, settings: TrainSettings, world_size: int) -> dict[str, Any]:
    return {
        "module": {},
        "global_steps": step,
        "global_samples": step * settings.examples_per_step,
        "skipped_steps": skipped,
        "dp_world_size": world_size,
        "mp_world_size": 1,
        "lr_scheduler": None,
        "universal_checkpoint_info": {"universal_checkpoint_version": _VERSION},
    }
