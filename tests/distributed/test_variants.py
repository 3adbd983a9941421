"""The sharded step on what the recipe's defaults and other models bring: checkpointing, tied heads, offload."""

from pathlib import Path
from typing import Any

import pytest
from ranks import run_on_ranks
from test_gradient_scale import UNEVEN, accumulate, assert_same_step, engine_of, single_process
from tiny import build_tiny_model
from toy import UFT, toy_step

from uft_ds.data.packing import micro_batch


def variant_step(folder: Path, file: str, gradient_checkpointing: bool) -> Any:
    engine = engine_of(folder, file=file, gradient_checkpointing=gradient_checkpointing)
    sequences = toy_step().sequences
    batches = [micro_batch([sequences[i] for i in members]) for members in UNEVEN[2][engine.rank]]
    grads, total = accumulate(engine, batches, UFT)
    return grads, total, engine.step(1e-3).grad_norm, []


@pytest.mark.parametrize(
    ("architecture", "tied", "file"), [("llama", True, "zero3_offload"), ("qwen3", False, "zero3_cpu")]
)
def test_checkpointed_layers_give_the_same_gradient(tmp_path: Path, architecture: Any, tied: bool, file: str) -> None:
    """Recomputed under ZeRO-3, with a tied head and weights in host memory: one process's gradients to 1e-5."""
    folder = build_tiny_model(tmp_path, architecture, tied=tied)
    definition = single_process(folder, "mse")
    for result in run_on_ranks(variant_step, 2, folder, file, True):
        assert_same_step(result, definition)
