"""What `uft plan` predicts against what DeepSpeed allocates and sends.

    python benchmarks/plan.py [--ranks 1 2 4] [--sizes SIZE ...] [--modes lockstep separate]

Random Qwen2- and Llama-shaped models of three sizes, on real ranks over gloo, with gradient checkpointing and without,
under ZeRO-3 with bounds that make a tiny model gather as a large one has to. Measured, on rank 0:

    gathered, reduced     bytes of all-gathers (returned) and of reductions (taken in) at DeepSpeed's communication
                          backend, a micro-step, over whole steps after two that warm up
    of all ranks          those of all-gathers in which every rank takes part: with a second copy inside a node
                          (`zero_hpz_partition_size`, here 2 of 4 ranks), what crosses the slow link
    weights               the base's shards that the parameters hold, or those of a reference's own copy of it
    adapter + optimiser   shards of the adapters, tensors of AdamW's state, master weights that are no adapter's storage
    gradients             the buffer of accumulated gradients, and the bucket in which they wait
    saved                 storages that autograd keeps for a micro-batch's backward, through torch's hooks

Predicted by the functions that `uft plan` calls, from the config alone. Bars: bytes sent within 1%, held within 10%.
Exits with 1 where one is missed. Evaluation comes first, as in each run.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from bars import table_of
from plan_cells import COPIED, SIZES, TRAINS_ALL, Bytes, Cell, grid, of_mixture, write_model
from plan_measured import measure
from plan_predicted import predict
from ranks import run_on_ranks
from rich.console import Console
from rich.table import Table

from uft_ds.data.micro_batch import MicroBatch

RANKS = (1, 2, 4)
SENT_BAR, HELD_BAR = 0.01, 0.10
FIELDS = {
    "gathered": SENT_BAR,
    "far": SENT_BAR,
    "reduced": SENT_BAR,
    "exchanged": SENT_BAR,
    "weights": HELD_BAR,
    "optimizer": HELD_BAR,
    "gradients": HELD_BAR,
    "saved": HELD_BAR,
}


@dataclass(frozen=True)
class Row:
    name: str
    measured: Bytes
    predicted: Bytes

    def ratio(self, field: str) -> float:
        """Predicted over measured; 1 where both are nothing."""
        measured, predicted = getattr(self.measured, field), getattr(self.predicted, field)
        return 1.0 if measured == predicted == 0 else predicted / measured if measured else math.inf

    def missed(self) -> list[str]:
        return [field for field, bar in FIELDS.items() if not abs(self.ratio(field) - 1) <= bar]


def compare(cells: list[Cell], ranks: int) -> list[Row]:
    """All cells in one set of processes: a start takes longer than a cell."""
    found = run_on_ranks(measure_all, ranks, cells, timeout_seconds=1800)
    return [
        Row(
            f"{cell.folder.name}, {ranks}, {'recomputed' if cell.gradient_checkpointing else 'kept'}"
            + ("" if cell.mode == "lockstep" else f", {cell.mode}")
            + ("" if cell.dtype == "float32" else f", {cell.dtype}")
            + ("" if cell.secondary == 1 else f", copies in {cell.secondary}")
            + ("" if cell.sequence_size == 1 else f", {cell.sequence_size} share rows")
            + ("" if cell.quantization is None else f", {cell.quantization}")
            + (", adapters of experts" if cell.experts else ""),
            measured,
            predict(cell, ranks, batch, step),
        )
        for cell, (measured, batch, step) in zip(cells, found[0], strict=True)
    ]


def measure_all(cells: list[Cell]) -> list[tuple[Bytes, MicroBatch, list[int]]]:
    """On one of the ranks."""
    return [measure(cell) for cell in cells]


def table(rows: list[Row]) -> Table:
    fields = ({"far": "of all ranks"}.get(field, field) for field in FIELDS)
    shown = table_of("measured MB, and predicted / measured", "model, ranks, activations", *fields)
    for row in rows:
        shown.add_row(row.name, *(f"{getattr(row.measured, f) / 1e6:.3f}  {row.ratio(f):.4f}" for f in FIELDS))
    return shown


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=list(RANKS))
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--modes", nargs="+", choices=["lockstep", "separate"], default=["lockstep"])
    options = parser.parse_args()
    console = Console(width=150, highlight=False)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        folders = [write_model(Path(name) / size, SIZES[size]) for size in options.sizes]
        for ranks in options.ranks:
            cells = grid(folders, options.modes)
            if ranks == 2:
                cells += [Cell(folders[0], recompute, dtype="bfloat16") for recompute in (True, False)]
                cells += [Cell(folders[0], recompute, sequence_size=2) for recompute in (True, False)]
                cells += [Cell(folder, True, mode) for mode in (TRAINS_ALL, COPIED) for folder in folders]
                cells += [Cell(folders[0], False, TRAINS_ALL, dtype="bfloat16")]
                cells += [Cell(folder, True, dtype="bfloat16", quantization="nf4") for folder in folders]
                cells += of_mixture(Path(name))
            found = compare(cells, ranks)
            if ranks == 4:  # in processes of its own: DeepSpeed makes such groups once
                found += compare([Cell(folders[0], gradient_checkpointing=True, secondary=2)], ranks)
            console.print(table(found))
            rows += found
    missed = [f"{row.name}: {field} {row.ratio(field):.4f}" for row in rows for field in row.missed()]
    console.print("every bar holds" if not missed else "MISSED: " + "; ".join(missed))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
