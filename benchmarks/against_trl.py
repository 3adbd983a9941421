"""TRL's trainers beside us: the same model, rows, adapter, optimiser and DeepSpeed file, on two CPU ranks.

    python benchmarks/against_trl.py [--only tiny,kto,dpo] [--model FOLDER]

TRL's nearest objective to UFT is KTO with `loss_type="apo_zero_unpaired"`, which is our `loss: l1` on scores 0 and 1.
Its DPO is our `loss: dpo`. Both sides train LoRA under ZeRO-3 with gradient checkpointing; TRL pads, and runs a policy
and a reference forward, each its own call. Our side is what a recipe gets by default: packed attention, and a prompt
that both answers of a pair begin with is forwarded once; then the same with `gradient_checkpointing: selective`, and
with `false`. The bars count the fastest of these in no more memory than TRL's.

"Products" is what the matrix products of our last step take alone, as a share of that step: what no other code saves.
"In the step" is what they take there, where two ranks share the machine's memory and caches, attention included.

Two models. The tiny one is a microbenchmark of communication: its arithmetic is nothing, so it shows what the
collectives of ZeRO's partitioning cost. On the real 135M one, arithmetic dominates. Tokens are real ones, padding is
not counted, and a prompt counts with each answer.

Rows of the real model, below UFT_TEST_DATA: `llama_factory/kto_en_demo.json` (a sample of KTO-mix) and
`ultrafeedback/train_clean.jsonl`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from bars import Bar, report, table_of
from ranks import run_on_ranks
from real_rows import real_rows_folder
from rich.console import Console
from rich.table import Table
from trl_sides import Result, losses_over_ranks, run_ours, run_trl, tokens_per_second, write_adapter
from trl_workloads import (
    RANKS,
    Workload,
    dpo_workload,
    kto_workload,
    padded_tokens,
    real_model,
    real_tokens,
    tiny_workload,
)

LOSSES_COMPARED = 5


def faster(work: Workload, one: list[Result] | None, other: list[Result]) -> list[Result]:
    return other if one is None or tokens_per_second(work, other) > tokens_per_second(work, one) else one


BARS: dict[str, tuple[float, str]] = {"tiny": (5.0, "tokens/s"), "kto": (3.5, "tokens/s"), "dpo": (3.0, "tokens/s")}
"""What our side is to reach over TRL's, in no more memory than TRL's trainer takes. Pairs are counted by their
responses' tokens, so tokens/s are responses/s."""


def compare(console: Console, model: Path | None, only: tuple[str, ...] = tuple(BARS)) -> list[Bar]:
    """Print a table for each workload and return the bars."""
    from importlib.metadata import version

    from reference_traffic import SETTINGS, VOCABULARY, largest, write_model

    measured: list[Bar] = []
    with tempfile.TemporaryDirectory() as name:
        tiny = write_model(Path(name) / "tiny")
        work = {"tiny": tiny_workload(tiny, SETTINGS, VOCABULARY)}
        data = real_rows_folder()
        real = model or real_model()
        if real is None or not data.is_dir():
            console.print(f"no real model or no real rows ({data}): the real workloads are left out", style="yellow")
        else:
            work |= {"kto": kto_workload(real, data), "dpo": dpo_workload(real, data)}
        for key, workload in ((key, workload) for key, workload in work.items() if key in only):
            adapter = Path(name) / f"adapter-{key}.safetensors"
            write_adapter(workload.folder, adapter)
            sides: dict[str, list[Result]] = {}
            for _ in range(workload.rounds):  # in turn, so that what else the machine does meets all of them
                for label, run, how in (
                    ("uft_ds", run_ours, True),
                    ("uft_ds, selective", run_ours, "selective"),
                    ("uft_ds, false", run_ours, False),
                    (f"TRL {version('trl')}", run_trl, False),
                    ("TRL, leaf modules", run_trl, True),
                ):
                    results = run_on_ranks(run, RANKS, workload, adapter, how, timeout_seconds=3000)
                    sides[label] = faster(workload, sides.get(label), results)
            console.print(_table(workload, sides))
            ours, selective, kept, theirs, leaf = sides.values()
            least, unit = BARS[key]
            in_their_memory = [side for side in (ours, selective, kept) if largest_peak(side) <= largest_peak(theirs)]
            fastest = max(in_their_memory or [ours], key=partial(tokens_per_second, workload))
            memory = largest_peak(fastest) / largest_peak(theirs)
            measured.append(Bar(f"{workload.label}: peak memory, TRL = 1, <= 1", memory, memory <= 1))
            for label, side, other, bar in (
                ("TRL in its memory", fastest, theirs, least),
                ("TRL with leaf modules", ours, leaf, 1.2),
                ("checkpointing whole layers", selective, ours, 1.0),
                ("selective", kept, selective, 1.0),
            ):
                ratio = tokens_per_second(workload, side) / tokens_per_second(workload, other)
                measured.append(Bar(f"{workload.label}: {unit} over {label} >= {bar}", ratio, ratio >= bar))
            for label, losses in (
                ("TRL", losses_over_ranks(theirs)),
                ("TRL with leaf modules", losses_over_ranks(leaf)),
                ("selective", selective[0].losses),
                ("false", kept[0].losses),
            ):
                worst = largest(abs(a - b) for a, b in list(zip(ours[0].losses, losses, strict=True))[:LOSSES_COMPARED])
                claim = f"{workload.label}: losses of the first {LOSSES_COMPARED} steps against {label} <= 1e-4"
                measured.append(Bar(claim, worst, worst <= 1e-4))
    return measured


def largest_peak(results: list[Result]) -> int:
    """Bytes by which the memory of a rank grew, of that rank where it grew most."""
    return max(result.peak_growth_bytes for result in results)


def largest_shares(results: list[Result]) -> tuple[float, float]:
    """Of a step's time on a rank, what its matrix products take alone, and what they and its attention take in it."""
    alone = max(result.product_seconds / result.seconds[-1] for result in results)
    return alone, max(result.share_in_step for result in results)


def _table(work: Workload, sides: dict[str, list[Result]]) -> Table:
    steps = range(work.steps)
    padding = sum(padded_tokens(work, s) for s in steps) / sum(real_tokens(work, s) for s in steps)
    title = (
        f"{work.label}: {work.ranks} ranks x {work.rows_per_rank} rows a step; "
        f"TRL forwards {padding:.2f} tokens a real one"
    )
    table = table_of(
        title, "", "tokens/s, TRL = 1", "peak memory, TRL = 1", "products", "in the step", "loss, first 5 steps"
    )
    theirs = next(results for name, results in sides.items() if name.startswith("TRL "))
    for name, results in sides.items():
        speed = tokens_per_second(work, results) / tokens_per_second(work, theirs)
        peak = largest_peak(results) / largest_peak(theirs)
        losses = results[0].losses if name.startswith("uft_ds") else losses_over_ranks(results)
        shown = " ".join(f"{loss:.4f}" for loss in losses[:LOSSES_COMPARED])
        shares = (f"{share:.2f}" if share else "" for share in largest_shares(results))
        table.add_row(name, f"{speed:.2f}", f"{peak:.2f}", *shares, shown)
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(BARS), help="workloads, separated by commas")
    parser.add_argument("--model", type=Path, help="a small real model; by default the quickstart's")
    options = parser.parse_args()
    from reference_traffic import versions

    versions()
    console = Console(width=120, highlight=False)
    return 1 if report(console, compare(console, options.model, tuple(options.only.split(",")))) else 0


if __name__ == "__main__":
    sys.exit(main())
