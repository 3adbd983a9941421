"""Plans of known models on given hardware, for the tests of `planning`; what plans share is computed once."""

from __future__ import annotations

import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

from tiny import build_tiny_model

from uft_ds.engine.deepspeed_file import read_deepspeed_file
from uft_ds.planning.hardware import Cluster, Figures, cluster_of
from uft_ds.planning.plan import Plan, make_plan
from uft_ds.planning.planner import Outcome, Planner, Setting
from uft_ds.planning.shapes import model_config, shipped_config
from uft_ds.planning.sharding import sharding_of
from uft_ds.planning.workload import workload_of
from uft_ds.recipe.to_settings import load_settings

MISTRAL = shipped_config("Mistral-7B-v0.1")


def cluster(nodes: int = 1, gpus: int = 8, **options: Any) -> Cluster:
    gpu = options.pop("gpu", "h100")
    figures = Figures(**({"gpu_memory": 80, "host_memory": 1000, "network_gbits": 400} | options))
    return cluster_of(nodes=nodes, gpus=gpus, gpu=gpu, figures=figures)


@lru_cache
def planner(base: str = "Qwen/Qwen2.5-32B") -> Planner:
    """Of one model; what plans share is computed once."""
    return Planner(model_config(base)[0])


def outcome(*overrides: str, on: Cluster | None = None, zero: dict[str, Any] | None = None) -> Outcome:
    """Of the 32B recipe. zero: changes to its DeepSpeed file."""
    settings = load_settings("uft_qwen32b", overrides)
    file = read_deepspeed_file(settings.deepspeed.name)
    file["zero_optimization"] |= zero or {}
    workload = workload_of(settings, shipped_config("Qwen2.5-32B"), tokens_per_response=None)
    return planner().plan(Setting(workload, settings.deepspeed.name, sharding_of(file), on or cluster()))


@lru_cache
def plan(*overrides: str, nodes: int = 1, gpus: int = 8, name: str = "uft_qwen32b", **options: Any) -> Plan:
    settings = load_settings(name, overrides)
    return make_plan(settings, cluster(nodes, gpus, **options), planner=planner(settings.model.base))


@lru_cache
def tiny_folder(architecture: Any = "qwen2") -> Path:
    return build_tiny_model(Path(tempfile.mkdtemp()), architecture)


def tiny(*overrides: str, gpus: int = 1, **options: Any) -> Plan:
    """A recipe of a model of some kilobytes, planned in a second."""
    given = ("model.attention=sdpa", "data.max_length=64", "train.tokens_per_micro_batch=256", "lora.rank=4")
    return plan(f"model.base={tiny_folder()}", *given, *overrides, gpus=gpus, name="uft_mistral7b", **options)
