"""Micro-steps above the bound, fill, and how even ranks are, on steps of real lengths.

Not a benchmark itself: a part of benchmarks/data.py.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from balance import imbalance
from bars import Bar, at_most, table_of
from data_rows import instruction_rows, pair_rows, prepared, problem_rows
from pools import Mixed
from rich.console import Console
from rich.table import Table
from sources import write_rows

from uft_ds.data.bins import fewest_micro_steps
from uft_ds.data.mixture import plan_steps
from uft_ds.data.packing import Packing, pack
from uft_ds.data.store.selection import Selection
from uft_ds.data.tokens.chat_tokenizer import ChatTokenizer

CAPACITIES, RANKS, PER_RANK = (2048, 4096, 16384), (1, 2, 8, 64), (16, 32)
PARITIES = {"Qwen2.5-32B": 95_000.0, "135M model": 6_100.0}
"""Tokens at which a sequence's attention costs as much as all the rest."""


@dataclass(frozen=True)
class PackedStep:
    """What one step's packing came to."""

    source: str
    capacity: int
    ranks: int
    per_rank: int
    above: int
    """Micro-steps above the bound."""
    micro_steps: int
    fill: float
    totals: float
    waiting: float
    seconds: float
    sequences_per_rank: float


def fitting(selection: Selection, capacity: int) -> Selection:
    """The units that one micro-batch can hold."""
    tokens_U = selection.store.tokens_U[selection.units_U]
    return Selection(selection.store, selection.units_U[tokens_U <= capacity])


def pack_steps(
    source: str, pools: Seq[Selection], *, capacity: int, ranks: int, per_rank: int, parity: float, num_steps: int
) -> list[PackedStep]:
    """Steps of a mixture, packed for all ranks."""
    ingredients = [Mixed(str(i), fitting(pool, capacity)) for i, pool in enumerate(pools)]
    steps = plan_steps(ingredients, seed=0, examples_per_step=per_rank * ranks, epochs=1, steps=num_steps)
    found = []
    for step in steps:
        start = time.perf_counter()
        packed = pack(step, tokens_per_micro_batch=capacity, world_size=ranks, packing=Packing(parity))
        seconds = time.perf_counter() - start
        lengths = [sum(sequence.num_tokens for sequence in unit) for unit in step.units]
        micro_steps = len(packed[0])
        totals, waiting = imbalance(packed, parity)
        found.append(
            PackedStep(
                source, capacity, ranks, per_rank,
                above=micro_steps - fewest_micro_steps(lengths, capacity, ranks),
                micro_steps=micro_steps,
                fill=sum(lengths) / (micro_steps * ranks * capacity),
                totals=totals, waiting=waiting, seconds=seconds,
                sequences_per_rank=len(step.sequences) / ranks,
            )
        )  # fmt: skip
    return found


def report_packing(console: Console, data: Path, chat: ChatTokenizer, folder: Path, options: Any) -> list[Bar]:
    rows = {"alpaca": instruction_rows(data), "gsm8k": problem_rows(data), "ultrafeedback": pair_rows(data)}
    stores = {
        name: prepared(write_rows(folder / f"{name}.jsonl", of), chat, folder / "cache", max_length=16_384).selection
        for name, of in rows.items()
    }
    sources = {name: [store] for name, store in stores.items()} | {"mixed": list(stores.values())}
    shown = table_of("lengths", "", "units", "tokens: median", "mean", "longest")
    for name, pools in sources.items():
        tokens = np.concatenate([pool.store.tokens_U for pool in pools])
        shown.add_row(
            name, str(len(tokens)), f"{np.median(tokens):.0f}", f"{tokens.mean():.0f}", str(tokens.max())
        )  # fmt: skip
    console.print(shown)
    bars = []
    for model, parity in PARITIES.items():
        found = [
            step
            for name, capacity, ranks, per_rank in itertools.product(sources, CAPACITIES, RANKS, PER_RANK)
            for step in pack_steps(
                name, sources[name], capacity=capacity, ranks=ranks, per_rank=per_rank, parity=parity,
                num_steps=options.steps if ranks <= 8 else -(-options.steps // 4),
            )
        ]  # fmt: skip
        for keys in (("capacity", "ranks", "per_rank"), ("source", "capacity")):
            console.print(packing_table(f"parity {parity:g} tokens ({model}); medians, worst in brackets", keys, found))
        bars.append(at_most(f"parity {parity:g}: micro-steps above the bound", max(s.above for s in found), 1))
        if model == "Qwen2.5-32B":
            enough = [step.totals for step in found if step.sequences_per_rank >= 16]
            bars.append(
                at_most(f"parity {parity:g}: imbalance of ranks' totals, 16 sequences a rank", max(enough), 0.03)
            )
    return bars


def packing_table(title: str, keys: tuple[str, ...], found: Seq[PackedStep]) -> Table:
    table = table_of(title, *keys, "steps", "+0", "+1", "more", "micro-steps", "fill", "totals %", "waiting %", "ms")

    def key(step: PackedStep) -> tuple[Any, ...]:
        return tuple(getattr(step, name) for name in keys)

    for value, group in itertools.groupby(sorted(found, key=key), key=key):
        steps = list(group)

        def shown(name: str, digits: int, scale: float = 1.0, steps: list[PackedStep] = steps) -> str:
            values = [scale * getattr(step, name) for step in steps]
            return f"{np.median(values):.{digits}f} ({max(values):.{digits}f})"

        above = Counter(min(step.above, 2) for step in steps)
        table.add_row(
            *(str(part) for part in value), str(len(steps)),
            *(f"{above[more] / len(steps):.1%}" for more in range(3)),
            shown("micro_steps", 0), f"{np.median([s.fill for s in steps]):.2f}",
            shown("totals", 2, 100), shown("waiting", 2, 100), shown("seconds", 0, 1e3),
        )  # fmt: skip
    return table
