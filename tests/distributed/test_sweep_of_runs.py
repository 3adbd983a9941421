"""A sweep of real runs: the second stage starts from the first, caches are shared, and one table compares them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import yaml
from runs import uft, write_recipe
from toy import objective

from uft_ds.record.metrics_file import read_metrics
from uft_ds.record.telemetry import health, read_rows


@pytest.mark.long
def test_two_stages_and_one_in_a_sweep(tiny_qwen2: Path, tmp_path: Path) -> None:
    """SFT, KTO from its adapter, and UFT: all done, none done twice, each with its pictures and its table."""
    recipe = str(write_recipe(tmp_path, tiny_qwen2, train__steps=2, train__checkpoint_every=2))
    rows = [{"prompt": f"p{i}", "chosen": "good " * (i % 3 + 1), "rejected": "bad"} for i in range(8)]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"format": "jsonl", "path": str(pairs), "pairs": "split"}
    kto = {"data.sources": [source], "objective.loss": "l1", "objective.reward_shift": "kl"}
    tree = {
        "name": "stages",
        "output": str(tmp_path / "runs"),
        "runs": [
            {"name": "sft", "recipe": recipe, "set": {"objective.loss": "nll"}},
            {"name": "kto", "recipe": recipe, "after": "sft", "set": kto},
            {"name": "uft", "recipe": recipe},
        ],
    }
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(yaml.safe_dump(tree))
    result = uft("sweep", str(sweep))
    assert result.returncode == 0, result.stdout + result.stderr
    runs = tmp_path / "runs"
    with (runs / "table.csv").open(newline="") as file:
        table = {row["run"]: row for row in csv.DictReader(file)}
    assert [row["status"] for row in table.values()] == ["done"] * 3
    assert float(table["uft"]["held_out/loss"]) > 0
    adapter = yaml.safe_load((runs / "kto" / "recipe.yaml").read_text())["reference"]["adapter"]
    assert adapter == str(runs / "sft" / "checkpoints" / "step-000002" / "adapter")
    first = next(line for line in read_metrics(runs / "kto" / "metrics.jsonl") if "grad_norm" in line)
    assert abs(first["log_ratio/binary"]) < 1e-5, "the second stage begins at the first's end"
    assert (runs / "kto" / "health.png").stat().st_size > 10_000
    held_out = read_rows(runs / "uft" / "held_out.csv")
    assert len(held_out) == 5
    numbers = health(held_out, objective())
    shown = float(table["uft"]["held_out/rank_correlation/score"])
    assert shown == pytest.approx(numbers["rank_correlation/score"], abs=1e-5)
    again = uft("sweep", str(sweep))
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("done before") == 3
    assert "training on" not in again.stdout
    changed = uft("sweep", str(sweep), "objective.beta=0.3")
    assert changed.returncode == 2
    assert "holds a run of another recipe (objective.beta: 0.3 now, 0.1 then)" in changed.stderr
