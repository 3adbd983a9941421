"""One rank's engine over a random model, as runs build it."""

from __future__ import annotations

import os
from typing import Any

import torch

from gpu_check.models import random_policy
from gpu_check.report import Place
from uft_ds.data.example import KINDS
from uft_ds.engine.deepspeed_file import deepspeed_config, read_deepspeed_file
from uft_ds.engine.engine import Engine
from uft_ds.engine.ranks import init_distributed
from uft_ds.host.ports import free_port
from uft_ds.objectives.objective import KindObjective, Objective
from uft_ds.streams.load import decoder_layer_class
from uft_ds.streams.model import UFTModel
from uft_ds.streams.recompute import Recompute
from uft_ds.training.determinism import make_deterministic


def join_group_of_one(*, deterministic: bool = True) -> None:
    """The process group of a single rank.

    Args:
        deterministic: whether torch takes deterministic kernels alone, as runs do by default.
    """
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    if deterministic:
        make_deterministic()
    init_distributed(5.0)


def engine_of(config: Any, place: Place, *, recompute: Recompute = True, mode: Any = "lockstep") -> Engine:
    """A bfloat16 model with float32 adapters of rank 16 under ZeRO-3, on one rank."""
    import deepspeed

    name = "zero3" if place.device.type == "cuda" else "zero3_cpu"
    filled = deepspeed_config(
        read_deepspeed_file(name), dtype=torch.bfloat16, max_grad_norm=1.0, own_linear=recompute != "selective"
    )

    def sharded(base: Any) -> None:
        """As if transformers had loaded it for ZeRO-3. DeepSpeed would cast the adapters of any other base, too."""
        deepspeed.zero.Init(module=base, config_dict_or_path=filled)

    policy = random_policy(
        config,
        place.device,
        dtype=torch.bfloat16,
        attention="packed",
        recompute=recompute,
        b_std=1e-3,
        sharded=sharded,
    )
    model = UFTModel(policy, reference_mode=mode)
    layer = decoder_layer_class(policy.get_base_model())
    return Engine(model, filled, layer_class=layer, weight_decay=0.0, collective_timeout_minutes=5.0)


def objective(loss: str) -> Objective:
    """One loss for all kinds."""
    return Objective(dict.fromkeys(KINDS, KindObjective({loss: 1.0}, beta=0.1)))
