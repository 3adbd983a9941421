"""README.md says which GPUs a model needs: what it says is what a plan says."""

from __future__ import annotations

from pathlib import Path

import pytest
from suites import long_but

from uft_ds.engine.deepspeed_file import read_deepspeed_file
from uft_ds.planning.hardware import Figures, cluster_of
from uft_ds.planning.planner import Outcome, Planner, Setting
from uft_ds.planning.shapes import shipped_config
from uft_ds.planning.sharding import sharding_of
from uft_ds.planning.workload import workload_of
from uft_ds.recipe.to_settings import load_settings

README = Path(__file__).parents[2] / "README.md"
MODELS = ("Qwen2.5-7B", "Llama-3.1-8B", "Qwen2.5-32B", "Llama-3.1-70B")
COLUMNS = (("zero3", 1), ("zero3", 2), ("zero3", 4), ("zero3", 8), ("zero3_offload", 1))


def outcome(model: str, file: str, gpus: int, planner: Planner) -> Outcome:
    """Of the 32B recipe with another base and smaller micro-batches."""
    settings = load_settings("uft_qwen32b", ("train.tokens_per_micro_batch=4096", f"deepspeed={file}"))
    cluster = cluster_of(nodes=1, gpus=gpus, gpu="h100", figures=Figures(network_gbits=400))
    workload = workload_of(settings, shipped_config(model), tokens_per_response=None)
    return planner.plan(Setting(workload, file, sharding_of(read_deepspeed_file(file)), cluster))


def row(model: str) -> str:
    """GB of each GPU; with the weights on the host also those of the host."""
    planner, cells = Planner(shipped_config(model)), []
    for file, gpus in COLUMNS:
        found = outcome(model, file, gpus, planner)
        gigabytes = -(-found.gpu.total_bytes // 10**9)
        host = f" + {-(-found.host.total_bytes // 10**9)} of the host" if "offload" in file else ""
        cells.append(f"{gigabytes}{host}")
    return f"| {model} | {' | '.join(cells)} |"


@pytest.mark.parametrize("model", long_but(["Qwen2.5-32B"], MODELS))
def test_the_readme_says_what_the_plan_says(model: str) -> None:
    """GB of each GPU, rounded up; where a row differs, the one to write is shown."""
    expected = row(model)
    found = [line for line in README.read_text(encoding="utf-8").splitlines() if line.startswith(f"| {model} |")]
    assert found == [expected]
