"""The small real model on real rows: a few steps through the whole pipeline. Minutes, hence `long`."""

import subprocess
import sys
from pathlib import Path

import pytest
from real_data import write_recipe

from uft_ds.examples.smollm2 import quickstart_model
from uft_ds.record.metrics_file import read_metrics


@pytest.mark.long
def test_a_few_real_steps_lower_the_loss(test_data: Path, tmp_path: Path) -> None:
    """Six steps on Dolly and UltraFeedback rows: exact start, falling held-out loss, rising instruction reward."""
    base = quickstart_model(say=lambda text: None)
    recipe = write_recipe(test_data, base, tmp_path, steps=6)
    command = [
        sys.executable,
        "-m",
        "uft_ds",
        "train",
        str(recipe),
        "train.lr=1e-3",
        "train.evaluate_every=6",
        f"reference.cache_dir={tmp_path / 'reference'}",
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "every log-ratio is 0.0 nats" in result.stdout
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    held_out = [line for line in lines if "held_out/loss" in line]
    assert held_out[0]["held_out/loss/instruction"] == pytest.approx(0.25)
    assert held_out[-1]["held_out/loss"] < held_out[0]["held_out/loss"]
    assert held_out[-1]["held_out/implicit_reward/instruction"] > 0
