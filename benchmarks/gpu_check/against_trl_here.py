"""TRL's KTO (`apo_zero_unpaired`) beside us on one rank: the same rows, adapter, optimiser and DeepSpeed file."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import transformers as hf
import trl_sides
import trl_workloads
from tiny import build_tiny_tokenizer

from gpu_check.environment import found_version
from gpu_check.models import sizes
from gpu_check.report import Place, Report

LAYERS = 4
"""Of Mistral 7B: the model is written to disk and read by both sides."""
LARGEST_LOSS_DIFFERENCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Of a step, whose losses are near 0.5. In bfloat16 TRL rounds its logits, to some nats of a response of 500 tokens."""


def run(report: Report, place: Place, side: str = "") -> None:
    """side: none, then both; each has a process of its own, in which nothing of the other's is left."""
    if side:
        _one(report, place, side)
        return
    report.fact("TRL", found_version("trl"))
    if not _imports(report, "trl"):
        return
    report.fact("model", f"Mistral 7B's shape, {LAYERS} layers, random weights" if not place.toy else "2 layers of 64")
    work = workload(place)
    trl_sides.write_adapter(work.folder, place.work / "adapter.safetensors")
    found: dict[str, dict[str, Any]] = {}
    for name in ("uft_ds", "trl"):
        values = _in_a_process(report, place, name)
        if values is not None:
            found[name] = values
            report.row("against TRL", side=name, **{key: values[key] for key in values if key != "losses"})
    if len(found) == 2:
        ours, theirs = found["uft_ds"], found["trl"]
        report.fact("tokens per second, TRL = 1", ours["tokens_per_second"] / theirs["tokens_per_second"])
        difference = max(abs(a - b) for a, b in zip(ours["losses"], theirs["losses"], strict=True))
        report.fact("largest difference of a step's loss", difference)
        allowed = LARGEST_LOSS_DIFFERENCE[work.dtype]
        report.demand(
            difference <= allowed,
            f"a step's loss differs from TRL's by {difference:.2g}, {allowed} allowed",
        )


def _imports(report: Report, package: str) -> bool:
    try:
        importlib.import_module(package)
    except ImportError as error:
        report.fact("not measured", f"{package} cannot be imported: {error}")
        return False
    return True


def workload(place: Place) -> trl_workloads.Workload:
    """The model, written once, and the rows."""
    from uft_ds.planning.shapes import shipped_config

    folder = place.work / "model"
    if place.toy:
        config: Any = hf.MistralConfig(**sizes(toy=True), sliding_window=None)
    else:
        config = shipped_config("Mistral-7B-v0.3")
        config.num_hidden_layers = LAYERS
    if not folder.is_dir():
        torch.manual_seed(0)
        with torch.device(place.device):
            model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.to("cpu").save_pretrained(folder)
        build_tiny_tokenizer(folder)
    steps, rows_per_rank = place.size(6, 3), place.size(16, 4)
    return trl_workloads.Workload(
        label="one rank",
        loss="l1",
        folder=folder,
        rows=trl_workloads.random_rows(rows_per_rank * steps, 250, place.size(600, 100)),
        rows_per_rank=rows_per_rank,
        steps=steps,
        learning_rate=1e-4,
        zero={},
        rounds=1,
        ranks=1,
        dtype=torch.bfloat16 if place.device.type == "cuda" else torch.float32,  # TRL has no bfloat16 on a CPU
        deepspeed="zero3" if place.device.type == "cuda" else "zero3_cpu",
    )


def _in_a_process(report: Report, place: Place, side: str) -> dict[str, Any] | None:
    out = place.work / f"{side}.json"
    command = [sys.executable, "-u", "-m", "gpu_check.stage", f"against_trl_here:{side}", "--out", str(out)]
    command += ["--work", str(place.work), "--seconds", f"{place.seconds_left:.1f}", *(["--cpu"] if place.toy else [])]
    try:
        result = subprocess.run(command, timeout=max(1.0, place.seconds_left - 3), check=False)
    except subprocess.TimeoutExpired:
        report.demand(False, f"{side} was not done in time")
        return None
    values = json.loads(Path(out).read_text(encoding="utf-8")) if out.is_file() else {"facts": {}, "problems": []}
    for problem in values["problems"]:
        report.demand(False, f"{side}: {problem}")
    if "losses" not in values["facts"]:
        report.demand(False, f"{side} ended with exit code {result.returncode} without a result")
        return None
    facts: dict[str, Any] = values["facts"]
    return facts


def _one(report: Report, place: Place, side: str) -> None:
    from gpu_check.engines import join_group_of_one

    work, adapter = workload(place), place.work / "adapter.safetensors"
    join_group_of_one(deterministic=side == "uft_ds")  # TRL's own operators are not asked for that
    result = trl_sides.run_ours(work, adapter, True) if side == "uft_ds" else trl_sides.run_trl(work, adapter, True)
    report.fact("losses", result.losses)
    report.fact("tokens_per_second", trl_sides.tokens_per_second(work, [result]))
    report.fact("peak_gb", result.peak_growth_bytes / 1e9)
    padded = sum(trl_workloads.padded_tokens(work, step) for step in range(work.steps))
    real = sum(trl_workloads.real_tokens(work, step) for step in range(work.steps))
    report.fact("tokens forwarded a real one", padded / real if side == "trl" else 1.0)
