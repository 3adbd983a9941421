"""`uft eval` against lm-evaluation-harness's own command: the same numbers, in how many seconds.

    python benchmarks/evaluation.py --base MODEL --data FOLDER [--limit 16] [--tasks truthfulqa_mc2,arc_challenge]

    harness        `lm_eval run --model hf` of the merged model
    merged         `uft eval` of it                               bar: harness / merged >= 1.0
    unmerged       `uft eval` of base and adapter, which are not merged
    two            `uft eval --processes 2` of the merged model   bar: harness / two >= 1.5, of wall seconds
    killed         `uft eval`, killed when half is answered, and the same command again

A random adapter is made and merged. All give the same numbers: the merged model to the last digit, the adapter where
the rounding of a merge turns no answer. OMP_NUM_THREADS=1 for each process; the ratio of one process is of CPU
seconds, so that other work on the machine disturbs it little.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from process_costs import cpu_seconds_of_children
from transformers import AutoModelForCausalLM

from uft_ds.evaluation.harness.local import local_tasks
from uft_ds.evaluation.harness.suites import AskedTask
from uft_ds.evaluation.results import read_evaluation
from uft_ds.export.convert import convert_to_merged

ROOT = Path(__file__).parents[1]
Numbers = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Measured:
    """numbers: by task and metric. cpu, wall: seconds."""

    numbers: Numbers
    cpu: float
    wall: float


def random_adapter(base: Path, folder: Path) -> Path:
    """A LoRA that changes answers about as much as a short training does."""
    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.005)
    model.save_pretrained(str(folder))
    return folder


def timed(command: Sequence[str], kill_at: tuple[Path, int] | None = None) -> tuple[float, float]:
    """CPU and wall seconds of a command.

    Args:
        kill_at: a folder of answers, and their number at which the command is killed.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    used, started = cpu_seconds_of_children(), time.monotonic()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while kill_at is not None and process.poll() is None:
        if answered(kill_at[0]) >= kill_at[1]:
            process.kill()
        time.sleep(0.05)
    said, errors = process.communicate()
    if process.returncode != 0 and kill_at is None:
        sys.exit(f"{' '.join(command)} failed:\n{said.decode()}\n{errors.decode()}")
    return cpu_seconds_of_children() - used, time.monotonic() - started


def answered(folder: Path) -> int:
    """Requests with an answer on the disk, in whole lines."""
    lines = [line for path in folder.rglob("rank-*.jsonl") for line in path.read_bytes().split(b"\n")[:-1]]
    return sum(len(json.loads(line)["answers"]) for line in lines)


def by_us(source: Path, out: Path, options: Sequence[str], **kill: Any) -> Measured | None:
    """`uft eval`; None if it was killed."""
    command = [sys.executable, "-m", "uft_ds", "eval", str(source), "--out", str(out), *options]
    cpu, wall = timed(command, **kill)
    if kill:
        return None
    numbers = {task.task: dict(task.metrics) for task in read_evaluation(out).tasks}
    print(f"{out.name}: {cpu:.1f} CPU s, {wall:.1f} s", file=sys.stderr, flush=True)
    return Measured(numbers, cpu, wall)


def by_harness(model: Path, out: Path, data: Path, tasks: Sequence[str], options: Sequence[str]) -> Measured:
    """The harness's own command, with the same rows."""
    out.mkdir()
    for task in local_tasks(data, [AskedTask(name, 0) for name in tasks]):
        task.write(out)
    cpu, wall = timed(
        [
            *(sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu", "--num_fewshot", "0"),
            *("--model_args", f"pretrained={model},dtype=float32", "--tasks", *tasks),
            *("--include_path", str(out), "--output_path", str(out / "results"), *options),
        ]
    )
    (path,) = (out / "results").rglob("results_*.json")
    found = json.loads(path.read_text())["results"]
    numbers = {
        task: {key: float(value) for key, value in values.items() if "," in key and "_stderr" not in key}
        for task, values in found.items()
    }
    print(f"harness: {cpu:.1f} CPU s, {wall:.1f} s", file=sys.stderr, flush=True)
    return Measured(numbers, cpu, wall)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tasks", default="truthfulqa_mc2,arc_challenge")
    parser.add_argument("--limit", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=8, help="of the harness, and of ours where numbers are equal")
    given = parser.parse_args()
    tasks = given.tasks.split(",")
    limit, batch = ["--limit", str(given.limit)], ["--batch-size", str(given.batch_size)]
    ours = ["--suite", ",".join(f"{task}=0" for task in tasks), "--data", str(given.data), *limit]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        adapter = random_adapter(given.base, folder / "adapter")
        merged = folder / "merged"
        convert_to_merged(adapter, merged, verify=False, say=lambda text: None)
        found = {
            "harness": by_harness(merged, folder / "harness", given.data, tasks, [*limit, "--batch_size", batch[1]]),
            "merged": by_us(merged, folder / "one", [*ours, *batch]),
            "merged, auto": by_us(merged, folder / "auto", ours),
            "two": by_us(merged, folder / "two", [*ours, *batch, "--processes", "2"]),
            "unmerged": by_us(adapter, folder / "unmerged", [*ours, *batch]),
        }
        total = answered(folder / "one" / "answers")
        kill_at = (folder / "killed" / "answers", total // 2)
        by_us(merged, folder / "killed", [*ours, *batch], kill_at=kill_at)
        left = total - answered(kill_at[0])
        found["killed"] = by_us(merged, folder / "killed", [*ours, *batch])
        show(found, total, left)


def show(found: dict[str, Measured | None], total: int, left: int) -> None:
    harness = found["harness"]
    assert harness is not None
    print(f"{total} requests; {left} were left when `killed` began again")
    print("| way | CPU s | wall s | harness / it, CPU | harness / it, wall | numbers |\n|---|---|---|---|---|---|")
    for name, one in found.items():
        assert one is not None
        different = [
            f"{task} {metric}: {one.numbers[task][metric]} and not {value}"
            for task, metrics in harness.numbers.items()
            for metric, value in metrics.items()
            if one.numbers[task][metric] != value
        ]
        same = "equal" if not different else "; ".join(different)
        cpu, wall = harness.cpu / one.cpu, harness.wall / one.wall
        print(f"| {name} | {one.cpu:.1f} | {one.wall:.1f} | {cpu:.2f} | {wall:.2f} | {same} |")


if __name__ == "__main__":
    main()
