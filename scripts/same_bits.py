"""Do two revisions train the same bits? For refactoring: every commit that should change nothing is held against this.

    python scripts/same_bits.py BEFORE [AFTER] [--steps 6] [--data runs/quickstart-data]

Runs the first steps of the quickstart with each revision (AFTER: the working tree, if it is left out) on two CPU ranks,
each with caches of its own, and compares the adapter's tensors and every metric that is no measurement of time or
memory. Needs what `uft quickstart` leaves: the small model and the data. Exits 1 where anything differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

MEASURED = ("seconds", "tokens_per_second", "examples_per_second", "memory/peak_gib", "checkpoint/stall_seconds")
ROOT = Path(__file__).parents[1]


def train(checkout: Path, folder: Path, data: Path, steps: int) -> tuple[str, list[dict[str, object]]]:
    """SHA-256 of the trained adapter's file, and the metrics line by line, of a run with the code of `checkout`."""
    run = folder / "run"
    located = {
        "data.sources.0.path": data / "instruction.jsonl",
        "data.sources.1.path": data / "scored.jsonl",
        "data.cache_dir": folder / "tokenized",
        "reference.cache_dir": folder / "reference",
        "output": run,
    }
    settings = {"train.steps": steps, "train.evaluate_every": steps, "train.checkpoint_every": steps}
    # As a whole: the revisions' recipes may hold out other sources.
    held_out = [{"format": "jsonl", "path": str(data / "held_out.jsonl")}]
    overrides = [f"data.held_out={json.dumps(held_out)}"]
    overrides += [f"{key}={json.dumps(str(value))}" for key, value in located.items()]
    overrides += [f"{key}={value}" for key, value in settings.items()]
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "uft_ds", "train", "quickstart", *overrides]
    subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
    (adapter,) = run.glob(f"checkpoints/step-{steps:06d}/adapter/adapter_model.safetensors")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    kept = [{key: value for key, value in line.items() if key not in MEASURED} for line in lines]
    return hashlib.sha256(adapter.read_bytes()).hexdigest(), kept


def train_revision(revision: str | None, data: Path, steps: int) -> tuple[str, list[dict[str, object]]]:
    """As `train`, with a revision checked out beside this tree; None: this tree as it is."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if revision is None:
            return train(ROOT, folder, data, steps)
        checkout = folder / "checkout"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(checkout), revision], check=True)
        try:
            return train(checkout, folder, data, steps)
        finally:
            subprocess.run([*git, "remove", "--force", str(checkout)], check=True)


def differences(before: list[dict[str, object]], after: list[dict[str, object]]) -> list[str]:
    """What differs in metrics that both have; names that only one has are listed once."""
    found = []
    if len(before) != len(after):
        found.append(f"{len(before)} lines before, {len(after)} after")
    names = {key for line in before for key in line} ^ {key for line in after for key in line}
    if names:
        print(f"metrics that only one of them has: {', '.join(sorted(names))}")
    for number, (old, new) in enumerate(zip(before, after, strict=False), start=1):
        for key in old.keys() & new.keys():
            if json.dumps(old[key]) != json.dumps(new[key]):  # NaN is stored as null; a float by all its digits
                found.append(f"line {number}, {key}: {old[key]} before, {new[key]} after")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before")
    parser.add_argument("after", nargs="?")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--data", type=Path, default=ROOT / "runs" / "quickstart-data")
    options = parser.parse_args()
    before_hash, before = train_revision(options.before, options.data.resolve(), options.steps)
    after_hash, after = train_revision(options.after, options.data.resolve(), options.steps)
    found = differences(before, after)
    if before_hash != after_hash:
        found.insert(0, f"the adapter: {before_hash[:16]} before, {after_hash[:16]} after")
    for line in found:
        print(line)
    print(f"{len(found)} differences" if found else f"the same bits: adapter {before_hash[:16]}, {len(before)} lines")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
