"""Online runs: do they learn, what do they cost, and are they exact after a kill?

    python benchmarks/online.py [--only kills,learning] [--seeds 1,2,3,4,5] [--steps 20] [--folder runs/online-study]

kills: a tiny model; a run is killed ten times at random moments, each time in another folder, and resumed; its adapter
and its record are compared with those of a run that nothing has disturbed, and so is a replay of its record.

learning: the quickstart's model and tasks. From one start for each seed (SFT of a few steps) each method sees the same
number of the policy's answers, 8 prompts with 4 answers a step: UFT, UFT with both sides centred, RLOO, and UFT offline
on as many answers of the start itself. Held-out prompts answered exactly right and their mean grade, as mean and half
the width of a 95% interval over the seeds; the log-ratio that was spent; seconds by phase. Not tuned: all have one
learning rate. An interrupted study goes on where it was, and a seed that has a line in `results/online_learning.jsonl`
is not run again. About seven minutes a run of 20 steps on two cores, six runs a seed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from quickstart_runs import Results, answers_of, interval, policy_of, train

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

KILLS, KILL_STEPS = 10, 6
HELD_OUT, MAX_NEW_TOKENS, BETA = 100, 24, 0.1
START_STEPS, LR = 4, 5e-4
METHODS: dict[str, dict[str, str]] = {
    "uft": {"objective.loss": "mse", "objective.center": "none"},
    "uft centred": {"objective.loss": "mse", "objective.center": "prompt"},
    "rloo": {
        "objective.loss": '{"score": "rloo", "instruction": "nll"}',
        "objective.beta": '{"score": 0.01}',
        "objective.center": "none",
    },
    "offline": {"objective.loss": "mse", "objective.center": "prompt"},
}
# --- kills ---


def adapter_of(run: Path) -> bytes:
    return (run / "latest" / "adapter" / "adapter_model.safetensors").read_bytes()


def record_of(run: Path) -> dict[str, list[Any]]:
    """All that was recorded, but for where the data lies."""
    return {
        path.name: [json.loads(line) | {"origin": ""} for line in path.read_text().split("\n") if line]
        for path in sorted((run / "rollouts" / "answers").glob("*.jsonl"))
    }


def started(recipe: Path, *options: str) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-m", "uft_ds", "train", str(recipe), *options]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(recipe.parent), os.environ.get("PYTHONPATH", "")])}
    return subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, env=environment
    )


def ended(recipe: Path, *options: str) -> float:
    """Seconds of a run that ends by itself."""
    began = time.monotonic()
    code = started(recipe, *options).wait(timeout=900)
    if code:
        raise SystemExit(f"{recipe}: exit code {code}; see {recipe.parent / 'run'}")
    return time.monotonic() - began


def killed_after(recipe: Path, seconds: float) -> str:
    """Start a run, kill it and its ranks after some seconds; says how far it had come."""
    process = started(recipe)
    run = recipe.parent / "run"
    try:
        process.wait(timeout=seconds)
        return "it had ended"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    from runs import wait_for_the_end_of

    wait_for_the_end_of(run)
    recorded = len(list((run / "rollouts" / "steps").glob("*.json")))
    metrics = run / "metrics.jsonl"
    trained = sum('"grad_norm"' in line for line in metrics.read_text().splitlines()) if metrics.exists() else 0
    return f"{recorded} steps recorded, {trained} trained"


def measure_kills(folder: Path, console: Any) -> list[Any]:
    """The bars of the kills."""
    from distributed.test_online_run import online_recipe  # the tiny run of the tests
    from reference_traffic import Bar
    from tiny import build_tiny_model

    base = build_tiny_model(folder / "base")
    recipe = online_recipe(folder / "whole", base)
    seconds = ended(recipe)
    whole = recipe.parent / "run"
    rng, same = random.Random(0), 0
    for number in range(KILLS):
        own = online_recipe(folder / f"kill{number}", base)
        at = rng.uniform(0.3, 1.0) * seconds
        state = killed_after(own, at)
        ended(own, "--resume")
        run = own.parent / "run"
        is_same = adapter_of(run) == adapter_of(whole) and record_of(run) == record_of(whole)
        same += is_same
        console.print(f"  killed after {at:.1f} s ({state}): {'the same bits' if is_same else 'DIFFERENT'}")
    ended(recipe, "--replay", str(whole), f"output={folder / 'replay'}")
    replayed = adapter_of(folder / "replay") == adapter_of(whole)
    return [
        Bar(f"runs that were killed and resumed, of {KILLS}, with the bits of the unbroken one", same, same == KILLS),
        Bar("a replay of the record has the bits of the run", float(replayed), replayed),
    ]


# --- learning ---


def held_out(data: Path) -> list[dict[str, str]]:
    """Right answers alone: scored ones need a loss, which the start does not have."""
    return [{"format": "jsonl", "path": str(data / "held_out.jsonl")}]


def sources(data: Path, seed: int) -> dict[str, Any]:
    """The online source alone: what the methods differ in is what they make of the policy's answers."""
    return {
        "data.sources": [
            {
                "format": "prompts",
                "path": str(data / "scored.jsonl"),
                "columns": {"response": None, "score": None},
                "answers": 4,
                "score_by": "code:uft_ds.examples.verifiable_scores:score",
            }
        ],
        "data.held_out": held_out(data),
        "train.seed": seed,
    }


def learn(folder: Path, base: Path, seed: int, steps: int) -> dict[str, dict[str, float]]:
    """All methods from one start; what each run's policy does on held-out data, by method."""
    data = folder / "data"
    here = folder / f"seed{seed}"
    start = here / "start"
    common = {"model.base": str(base), "train.evaluate_every": 1000, "train.checkpoint_every": 5}
    of_start = {
        "data.sources": [{"format": "jsonl", "path": str(data / "instruction.jsonl")}],
        "data.held_out": held_out(data),
    }
    train(
        "quickstart",
        start,
        common | of_start | {"train.steps": START_STEPS, "train.seed": seed, "objective.loss": "nll"},
    )
    online = (
        common
        | sources(data, seed)
        | {
            "train.examples_per_step": 32,
            "train.steps": steps,
            "train.lr": LR,
            "start.adapter": str(start),
            "generator.max_new_tokens": MAX_NEW_TOKENS,
        }
    )
    frozen = here / "frozen"
    # Answers of the start to the prompts that the online runs ask: at this rate nothing moves.
    train("quickstart_online", frozen, online | METHODS["uft centred"] | {"train.lr": 1e-12})
    found = {"start": measured(start, base, data)}
    for name, overrides in METHODS.items():
        run = here / name.replace(" ", "_")
        if name == "offline":
            record = [{"format": "recorded", "path": str(frozen / "rollouts" / "answers")}]
            train(
                "quickstart_online", run, online | overrides | {"data.sources": record, "generator.max_new_tokens": 512}
            )
        else:
            train("quickstart_online", run, online | overrides)
        found[name] = measured(run, base, data) | spent(run)
    return found


def spent(run: Path) -> dict[str, float]:
    """KL, as the mean log-ratio of the last three steps' answers, and mean seconds of a step by phase."""
    from uft_ds.record.metrics_file import read_metrics

    lines = [line for line in read_metrics(run / "metrics.jsonl") if "grad_norm" in line]

    def mean(name: str, of: list[dict[str, Any]]) -> float:
        return statistics.fmean(line.get(name) or 0.0 for line in of)

    return {
        "log-ratio": mean("log_ratio/score", lines[-3:]),
        "generate, s": mean("rollouts/generation_seconds", lines),
        "score, s": mean("rollouts/scoring_seconds", lines),
        "train, s": mean("seconds", lines),
    }


def measured(run: Path, base: Path, data: Path) -> dict[str, float]:
    """Held-out prompts answered exactly right, and their mean grade; remembered beside the run."""
    stored = run / "measured.json"
    if stored.exists():
        found: dict[str, float] = json.loads(stored.read_text(encoding="utf-8"))
        return found
    from uft_ds.examples.verifiable import grade, is_correct, read_tasks

    policy, tokenizer = policy_of(run, base)
    tasks = read_tasks(data / "held_out.jsonl")
    answers = answers_of(policy.merge_and_unload(), tokenizer, tasks, MAX_NEW_TOKENS)
    found = {
        "exactly right": sum(map(is_correct, tasks, answers)) / len(tasks),
        "mean grade": sum(map(grade, tasks, answers)) / len(tasks),
    }
    stored.write_text(json.dumps(found) + "\n", encoding="utf-8")
    return found


def measure_learning(folder: Path, seeds: list[int], steps: int, console: Any) -> None:
    """Print the table of all seeds."""
    from rich.table import Table

    from uft_ds.examples.smollm2 import quickstart_model
    from uft_ds.examples.verifiable import write

    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "data", num_held_out=HELD_OUT)
    base = quickstart_model()
    known, results = Results("online_learning"), []
    for seed in seeds:
        run = {"seed": seed, "steps": steps}
        found = known.of(run)
        if found is None:
            known.add(run, found := learn(folder, base, seed, steps))
        results.append(found)
    title = f"{len(seeds)} seeds, {steps} steps of 8 prompts x 4 answers; mean +- half a 95% interval"
    columns = ("exactly right", "mean grade", "log-ratio", "generate, s", "score, s", "train, s")
    table = Table("", *columns, title=title)
    for name in results[0]:
        cells = [[of[name][column] for of in results if column in of[name]] for column in columns]
        table.add_row(name, *(interval(values) if values else "" for values in cells))
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="kills,learning", help="parts, separated by commas")
    parser.add_argument("--seeds", default="1,2,3,4,5")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--folder", type=Path, default=Path("runs/online-study"))
    options = parser.parse_args()
    from reference_traffic import report, versions
    from rich.console import Console

    versions()
    console, missed = Console(width=130, highlight=False), 0
    parts = options.only.split(",")
    if "kills" in parts:
        with tempfile.TemporaryDirectory() as name:
            missed += report(console, measure_kills(Path(name), console))
    if "learning" in parts:
        seeds = [int(seed) for seed in options.seeds.split(",")]
        measure_learning(options.folder.absolute(), seeds, options.steps, console)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
