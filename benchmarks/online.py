"""Online runs that are killed: are they, resumed or replayed, the unbroken run?

    python benchmarks/online.py

A tiny model; a run is killed ten times at random moments, each time in another folder, and resumed; its adapter and its
record are compared with those of a run that nothing has disturbed, and so is a replay of its record. Whether online
steps learn is a part of `study.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bars import Bar, report

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

KILLS = 10


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


def measure_kills(folder: Path, console: Any) -> list[Bar]:
    """The bars of the kills."""
    from distributed.test_online_run import online_recipe  # the tiny run of the tests
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


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    from reference_traffic import versions
    from rich.console import Console

    versions()
    console = Console(width=130, highlight=False)
    with tempfile.TemporaryDirectory() as name:
        return 1 if report(console, measure_kills(Path(name), console)) else 0


if __name__ == "__main__":
    sys.exit(main())
