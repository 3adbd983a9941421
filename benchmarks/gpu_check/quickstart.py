"""A run from data to a merged model on one rank in bfloat16: the quickstart; or, without its model, a random one's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tiny import build_tiny_model

from gpu_check.report import Place, Report
from uft_ds.examples.smollm2 import NAME, VARIABLE, default_cache_dir, is_complete
from uft_ds.examples.verifiable import write
from uft_ds.record.run_folder import RunFolder

STEPS = 30


def run(report: Report, place: Place) -> None:
    model = real_model()
    common = (
        "launch.ranks=1",
        f"deepspeed={'zero3' if place.device.type == 'cuda' else 'zero3_cpu'}",
        "model.dtype=bfloat16",
        f"reference.cache_dir={json.dumps(str(place.work / 'reference'))}",  # nothing is known from elsewhere
    )
    # On a CPU the real model takes minutes: there the kit is tested, not the model.
    if model is None or place.toy:
        report.fact("model", "random, 3 layers of 64: its answers mean nothing, the run does")
        _random_run(report, place, common)
        return
    report.fact("model", str(model.name))
    code = _uft(report, place, "quickstart", "--folder", str(place.work / "runs"), *common, f"train.steps={STEPS}")
    report.demand(code == 0, f"uft quickstart ended with exit code {code}")
    result = place.work / "runs" / "quickstart" / "quickstart.json"
    if result.is_file():
        values = json.loads(result.read_text(encoding="utf-8"))
        for name in ("correct_before", "correct_after", "mean_grade_before", "mean_grade_after", "seconds"):
            report.fact(name, values[name])
        report.fact("share kept by merging", values["share_kept_by_merging"])
    _of_the_run(report, place.work / "runs" / "quickstart")


def real_model() -> Path | None:
    """The quickstart's model, if it is in the cache or carried along; nothing is fetched."""
    given = os.environ.get(VARIABLE)
    folder = Path(given) if given else default_cache_dir() / NAME
    return folder if is_complete(folder) or (given and (folder / "config.json").is_file()) else None


def _random_run(report: Report, place: Place, common: tuple[str, ...]) -> None:
    data, output = place.work / "data", place.work / "run"
    write(data)
    base = build_tiny_model(place.work / "base", "llama")
    located = {
        "model.base": base,
        "data.sources.0.path": data / "instruction.jsonl",
        "data.sources.1.path": data / "scored.jsonl",
        "data.held_out.0.path": data / "held_out.jsonl",
        "data.held_out.1.path": data / "held_out_scored.jsonl",
        "output": output,
    }
    steps = place.size(STEPS, 2)
    shorter = (
        f"train.steps={steps}",
        f"train.checkpoint_every={steps}",
        f"train.evaluate_every={steps}",
        "data.max_length=400",
    )
    overrides = (*(f"{key}={json.dumps(str(path))}" for key, path in located.items()), *common, *shorter)
    code = _uft(report, place, "train", "quickstart", *overrides)
    report.demand(code == 0, f"uft train ended with exit code {code}")
    _of_the_run(report, output)


def _of_the_run(report: Report, output: Path) -> None:
    metrics = RunFolder(output).metrics
    if not metrics.is_file():
        report.demand(False, "the run has left no metrics")
        return
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    report.demand(bool(losses), "the run has left no loss")
    if losses:
        report.fact("steps", len(losses))
        report.fact("loss of the first and the last step", f"{losses[0]:.4g}, {losses[-1]:.4g}")
        report.demand(all(abs(loss) < float("inf") for loss in losses), "a loss is not finite")
    speeds = sorted(row["tokens_per_second"] for row in rows if "tokens_per_second" in row)
    if speeds:
        report.fact("tokens per second, median step", speeds[len(speeds) // 2])


def _uft(report: Report, place: Place, *arguments: str) -> int:
    """Run `uft`; its output follows in the log."""
    command = [sys.executable, "-m", "uft_ds", *arguments]
    try:
        return subprocess.run(command, cwd=place.work, timeout=max(1.0, place.seconds_left), check=False).returncode
    except subprocess.TimeoutExpired:
        report.demand(False, f"uft {arguments[0]} had no time left")
        return -1
