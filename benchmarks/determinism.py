"""What `train.deterministic`, the default, costs a step under ZeRO-3.

    python benchmarks/determinism.py [--ranks 2] [--rounds 3]

Seconds of the fastest step on rank 0, of a random Qwen2-shaped model with frozen weights of 210 MB, in three settings:

    off       any kernels
    filled    deterministic kernels, and torch fills what it allocates with NaN: torch's own default
    ours      deterministic kernels, nothing is filled: `make_deterministic`, as every run has it

The settings take turns within one process, so that all of them meet the same load of the machine. Then, in one process,
the time of `torch.empty` for 64 MiB, alone and with what a gather does next, a copy into it. `--ranks 0` leaves out the
steps.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from ranks import run_on_ranks
from reference_traffic import Case, write_model

from uft_ds.training.determinism import make_deterministic

HIDDEN, LAYERS = 1024, 4
SETTINGS = ("off", "filled", "ours")


def take(setting: str) -> None:
    make_deterministic()
    deterministic: Any = torch.utils.deterministic
    deterministic.fill_uninitialized_memory = setting == "filled"
    torch.use_deterministic_algorithms(setting != "off")


def measure(folder: Path, rounds: int) -> dict[str, float]:
    """On one of the ranks: seconds of the fastest step in each setting."""
    case = Case(folder, "lockstep", gradient_checkpointing=True, sequences_per_rank=2)
    case.step()  # the first step makes the optimiser's state
    seconds: dict[str, list[float]] = {setting: [] for setting in SETTINGS}
    for _ in range(rounds):
        for setting in SETTINGS:
            take(setting)
            torch.distributed.barrier()
            started = time.perf_counter()
            case.step()
            seconds[setting].append(time.perf_counter() - started)
    return {setting: min(of_setting) for setting, of_setting in seconds.items()}


def allocation(setting: str, source: torch.Tensor | None = None, rounds: int = 7) -> float:
    """Milliseconds of the fastest allocation of 64 MiB, and of a copy of `source` into it."""
    take(setting)
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        allocated = torch.empty(2**24)
        if source is not None:
            allocated.copy_(source)
        seconds.append(time.perf_counter() - started)
        del allocated
    return 1000 * min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.ranks:
        with tempfile.TemporaryDirectory() as name:
            folder = write_model(Path(name), hidden=HIDDEN, layers=LAYERS)
            seconds = run_on_ranks(measure, options.ranks, folder, options.rounds, timeout_seconds=900)[0]
        for setting in SETTINGS:
            print(f"{setting:<8} {seconds[setting]:.3f} s a step ({seconds[setting] / seconds['off']:.2f} x off)")
    source = torch.ones(2**24)
    for setting in SETTINGS:
        alone, copied = allocation(setting), allocation(setting, source)
        print(f"{setting:<8} torch.empty(64 MiB) {alone:.2f} ms, with a copy into it {copied:.2f} ms")


if __name__ == "__main__":
    main()
