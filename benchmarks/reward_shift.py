"""What a reward shift costs: training time of the same steps under each, relative to `none`.

    python benchmarks/reward_shift.py [--steps 6] [--folder runs/reward_shift]

The quickstart's model on pairs of answers to tasks: split for `ema` and `kl`, as their papers have it; kept together
for `prompt_mean` and `center`, which else find no two responses to a prompt; `none` both ways. With a live reference
and with one that a first, discarded run has cached: `kl` forwards both streams whatever the cache knows.
Times are sums over the steps after the first. Everything is run anew.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any


def write_pairs(path: Path, count: int) -> None:
    from uft_ds.examples.verifiable import write

    data = write(path.parent / "rows", num_prompts=4 * count, num_held_out=1)
    pairs = [
        {"prompt": row.task.prompt, "chosen": row.task.answer, "rejected": row.response}
        for row in data.scored_rows
        if row.score is not None and row.score < 1.0
    ]
    path.write_text("".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs[:count]), encoding="utf-8")


def seconds_after_the_first(run: Path) -> float:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return sum(line["seconds"] for line in lines if line["step"] > 1 and "seconds" in line)


def main() -> None:
    from uft_ds.examples.smollm2 import quickstart_model

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--folder", type=Path, default=Path("runs/reward_shift"))
    options = parser.parse_args()
    folder = options.folder.absolute()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    pairs = folder / "pairs.jsonl"
    write_pairs(pairs, 10 * options.steps)
    cases = [("split", shift) for shift in ("none", "ema", "kl")] + [
        ("keep", shift) for shift in ("none", "prompt_mean", "center")
    ]
    runs: list[dict[str, Any]] = [
        {
            "name": f"{kept}-{shift}-{'cached' if cache else 'live'}",
            "recipe": "quickstart",
            "set": {
                "data.sources": [{"format": "jsonl", "path": str(pairs), "pairs": kept}],
                "data.held_out": [],
                "objective.loss": "l1",
                "objective.reward_shift": "none" if shift == "center" else shift,
                "objective.center": "prompt" if shift == "center" else "none",
                "reference.cache": cache,
            },
        }
        for kept, shift in cases
        for cache in (True, False)
    ]
    runs.insert(0, {**runs[0], "name": "warm-up", "set": {**runs[0]["set"], "objective.loss": "mse"}})
    shared = {
        "model.base": str(quickstart_model(say=print)),
        "train.steps": options.steps,
        "reference.cache_dir": str(folder / "reference"),
    }
    sweep = {"name": "reward_shift", "output": str(folder / "runs"), "set": shared, "runs": runs}
    path = folder / "sweep.json"
    path.write_text(json.dumps(sweep), encoding="utf-8")
    subprocess.run([sys.executable, "-m", "uft_ds", "sweep", str(path)], check=True)
    print(f"{'shift':>12} {'cached':>8} {'live':>8}   time of a step, relative to none")
    for kept, shift in cases:
        ratios = []
        for how in ("cached", "live"):
            mine, plain = (
                seconds_after_the_first(folder / "runs" / f"{kept}-{name}-{how}") for name in (shift, "none")
            )
            ratios.append(f"{mine / plain:8.2f}")
        print(f"{shift:>12} {' '.join(ratios)}   {kept}")


if __name__ == "__main__":
    main()
