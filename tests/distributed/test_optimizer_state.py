"""What is saved of the optimiser puts a fresh engine exactly where the saved one stood, on any number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engines import resumed_run, saved_run
from ranks import run_on_ranks
from tiny import build_tiny_model

BF16 = {"dtype": torch.bfloat16, "lora_dtype": torch.bfloat16}


@pytest.mark.long
@pytest.mark.parametrize(
    ("file", "ranks", "model"),
    [
        ("zero3_cpu", 2, {}),
        ("zero3_cpu", 3, {"gradient_checkpointing": True}),
        ("zero3_cpu", 2, BF16),
        ("zero3_offload", 2, {}),
        ("zero2", 2, {}),
        ("zero2", 3, BF16),
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


@pytest.mark.long
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (("zero3_cpu", 2), ("zero3_cpu", 1)),
        (("zero2", 2), ("zero3_cpu", 4)),
        (("zero3_cpu", 3), ("zero2", 2)),
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
