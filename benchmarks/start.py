"""What a start costs: CPU and wall seconds of a whole run of one step of a toy model on two ranks.

    python benchmarks/start.py [--rounds 5] [--before CHECKOUT]

    uft train      one import; the ranks are forked from the command
    torchrun       the same ranks, each a program of its own
    before         `uft train` of another checkout, with --before: bars 0.5 x its CPU seconds, 0.6 x its wall seconds

They take turns, so that all of them meet the same load of the machine; the table shows medians. OMP_NUM_THREADS=1. The
token cache is warm, the reference cache is empty at each start.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from process_costs import cpu_seconds_of_children

from uft_ds.doctor.toy import write_toy
from uft_ds.host.ports import free_port

ROOT = Path(__file__).parents[1]
BARS = {"CPU": 0.5, "wall": 0.6}


def ways(before: Path | None) -> dict[str, tuple[Path, list[str]]]:
    """The checkout and the program of each way, without the recipe."""
    found = {
        "uft train": (ROOT, ["-m", "uft_ds", "train"]),
        "torchrun": (ROOT, ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "uft_ds.train"]),
    }
    if before is not None:
        found["before"] = (before, ["-m", "uft_ds", "train"])
    return found


def measure(checkout: Path, program: list[str], recipe: Path) -> dict[str, float]:
    """Seconds of one run, its ranks included."""
    for left in ("run", "reference"):
        shutil.rmtree(recipe.parent / left, ignore_errors=True)
    if "torch.distributed.run" in program:
        program = [*program[:2], "--master-port", str(free_port()), *program[2:]]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(checkout)}
    used, started = cpu_seconds_of_children(), time.monotonic()
    subprocess.run(
        [sys.executable, *program, str(recipe)], check=True, capture_output=True, env=environment, cwd=recipe.parent
    )
    return {"CPU": cpu_seconds_of_children() - used, "wall": time.monotonic() - started}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--before", type=Path, help="another checkout of this project")
    options = parser.parse_args()
    measured: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        recipe = write_toy(Path(name), has_gpus=False)
        measure(*ways(None)["uft train"], recipe)  # fills the token cache
        for _ in range(options.rounds):
            for way, (checkout, program) in ways(options.before).items():
                measured.setdefault(way, []).append(measure(checkout, program, recipe))
    medians = {
        way: {what: statistics.median(one[what] for one in runs) for what in BARS} for way, runs in measured.items()
    }
    for way, seconds in medians.items():
        ratios = {what: medians["uft train"][what] / seconds[what] for what in BARS}
        print(
            f"{way:<10} CPU {seconds['CPU']:6.1f} s   wall {seconds['wall']:6.1f} s   "
            f"uft train takes {ratios['CPU']:.2f} and {ratios['wall']:.2f} of it"
        )
        if way == "before":
            for what, bar in BARS.items():
                print(f"{what}: {'kept' if ratios[what] <= bar else 'MISSED'}: {ratios[what]:.2f}, bar {bar}")


if __name__ == "__main__":
    main()
