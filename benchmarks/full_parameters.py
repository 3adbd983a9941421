"""All parameters trained: UFT and DPO, the reference in the cache or a copy, beside SFT and TRL's DPO with two models.

    python benchmarks/full_parameters.py [--model FOLDER] [--only SFT,UFT]

The rows, model, optimiser and DeepSpeed file are those of `against_trl.py`'s pairs: SmolLM2-135M in float32 on two
ZeRO-3 CPU ranks, pairs of UltraFeedback, two a rank and step, layers recomputed. TRL trains the model with a second
one as the reference, each in an engine of its own. Ours computes the reference of all rows before the first step, which
is not timed: its seconds are printed beside the steps'. About a quarter of an hour on two cores.

    memory      peak of a rank's resident memory in the steps, over what it was before any weight was loaded; freed
                blocks of 1 MiB and more go back to the system, as the holes that glibc keeps grow with each step (by a
                sixth of the memory in four steps of SFT) and differ from run to run more than the ways do
    gathered    bytes that all-gathers return on a rank, a step

Bars: UFT's memory <= 1.02 and gathered bytes 1.00 of SFT's; against TRL memory <= 0.6, tokens/s >= 1.5. With a frozen
copy as the reference: the same losses, gathered bytes <= 1.55 of SFT's, memory <= 0.8 of TRL's. The copy's shards lie
in host memory, which on a CPU is the memory that is measured.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from bars import Bar, at_most, report, table_of
from plan_measured import counting
from ranks import run_on_ranks
from real_rows import real_rows_folder
from rich.console import Console
from toy import objective
from trl_sides import (
    BETA,
    WARM_UP_STEPS,
    Result,
    deepspeed_file,
    losses_over_ranks,
    peak,
    recording_trainer,
    reset_peak,
    tokens_per_second,
)
from trl_workloads import Workload, dpo_workload, real_model, steps_of

COPY = "UFT, a copy"
LEARNING_RATE = 1e-5
STEPS = WARM_UP_STEPS + 2
ONE_ROW = 1 << 20
"""More tokens than a step has: each rank forwards its part of a step at once, as TRL does."""


@dataclass(frozen=True)
class Measured:
    """Of one rank. before: seconds that the reference took. gathered: bytes a step; None where not counted."""

    result: Result
    gathered: float | None = None
    before: float = 0.0


def run_ours(work: Workload, loss: str, copies: bool = False) -> Measured:
    """copies: whether the reference is a frozen copy of the base, which each step forwards; else the cache."""
    from uft_ds.data.packing import Packing
    from uft_ds.engine.engine import Engine, partitioned_loading, with_shards_on_host
    from uft_ds.host.process import returning_freed_memory
    from uft_ds.known.cache import Known, fill
    from uft_ds.objectives.reference import HowReference
    from uft_ds.streams.load import decoder_layer_class, load_base
    from uft_ds.streams.model import UFTModel
    from uft_ds.training.forwarding import Method
    from uft_ds.training.step import run_step

    base_bytes, config = reset_peak(), deepspeed_file(work)
    load = partial(load_base, str(work.folder), revision=None, dtype=work.dtype, attention="packed")
    with partitioned_loading(config):
        base = load(gradient_checkpointing=True)
    base.requires_grad_(True)
    reference = None
    if copies:
        with partitioned_loading(with_shards_on_host(config)):
            reference = load(gradient_checkpointing=False)
    model = UFTModel(base, reference=reference, reference_mode="separate")
    with returning_freed_memory():
        engine = Engine(
            model,
            config,
            layer_class=decoder_layer_class(base),
            weight_decay=0.0,
            betas=(0.9, 0.999),
            packing=Packing(share_prompts=True),
        )
        steps = steps_of(work)
        with engine.evaluating():  # as every run does before its first step: ZeRO-3 keeps what it decides then
            for batch in engine.micro_batches(steps[0], ONE_ROW):
                engine(batch, [engine.streams[name] for name in ("policy", *(["reference"] if copies else []))])
        how: HowReference = "none" if loss == "nll" else "separate" if copies else "cached"
        known, started = Known.of_reference(how), time.perf_counter()
        if how == "cached":
            fill(engine, known, steps, ONE_ROW, flush_every=work.steps + 1)
        before = time.perf_counter() - started
        model.leave_base()
        method = Method(engine, objective(loss, BETA), known, ONE_ROW)
        losses, seconds = [], []
        with counting() as sent:
            for step in steps:
                started = time.perf_counter()
                losses.append(run_step(method, step, work.learning_rate).metrics["loss"])
                seconds.append(time.perf_counter() - started)
    return Measured(Result(losses, seconds, peak() - base_bytes), sent.gathered / work.steps, before)


def run_trl(work: Workload) -> Measured:
    from uft_ds.host.process import returning_freed_memory

    with tempfile.TemporaryDirectory() as output:
        trainer, recording = recording_trainer(work, output, two_models=True, counts_weights=True)
        with returning_freed_memory():
            trainer.train()
    return Measured(recording.result())


def bars_of(
    found: dict[str, list[Measured]], peaks: dict[str, int], speeds: dict[str, float], trl: str
) -> Iterator[Bar]:
    """The bars between ways that were run."""

    def both(*names: str) -> bool:
        return all(name in found for name in names)

    gathered = {name: ranks[0].gathered or 0.0 for name, ranks in found.items()}
    if both("UFT", "SFT"):
        yield at_most("UFT: peak memory / SFT's", peaks["UFT"] / peaks["SFT"], 1.02)
        ratio = gathered["UFT"] / gathered["SFT"]
        yield Bar("UFT: gathered bytes / SFT's = 1.00", ratio, abs(ratio - 1) < 0.005)
    if both(COPY, "SFT"):
        yield at_most(f"{COPY}: gathered bytes / SFT's", gathered[COPY] / gathered["SFT"], 1.55)
    if both(COPY, "UFT"):
        losses = zip(found[COPY][0].result.losses, found["UFT"][0].result.losses, strict=True)
        yield at_most(f"{COPY}: losses are UFT's", max(abs(one - other) for one, other in losses), 1e-5)
    if both(COPY, trl):
        yield at_most(f"{COPY}: peak memory / TRL's", peaks[COPY] / peaks[trl], 0.8)
    if both("DPO", trl):
        yield at_most("DPO: peak memory / TRL's", peaks["DPO"] / peaks[trl], 0.6)
        ratio = speeds["DPO"] / speeds[trl]
        yield Bar("DPO: tokens/s / TRL's >= 1.5", ratio, ratio >= 1.5)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a small real model; by default the quickstart's")
    parser.add_argument("--only", default="", help="ways, separated by commas: SFT, UFT, copy, DPO, TRL; default: all")
    given = parser.parse_args()
    from importlib.metadata import version

    from reference_traffic import versions

    versions()
    data = real_rows_folder()
    model = given.model or real_model()
    if model is None or not data.is_dir():
        raise SystemExit(f"no model (make fetch), or no rows in {data} (UFT_TEST_DATA)")
    work = replace(dpo_workload(model, data), steps=STEPS, learning_rate=LEARNING_RATE)
    trl = f"TRL {version('trl')} DPO"
    ways: dict[str, tuple[Any, ...]] = {
        "SFT": (run_ours, "nll"),
        "UFT": (run_ours, "mse"),
        COPY: (run_ours, "mse", True),
        "DPO": (run_ours, "dpo"),
        trl: (run_trl,),
    }
    if given.only:
        of_word = {"SFT": "SFT", "UFT": "UFT", "copy": COPY, "DPO": "DPO", "TRL": trl}
        asked = given.only.split(",")
        if unknown := set(asked) - set(of_word):
            parser.error(f"--only: {', '.join(sorted(unknown))} unknown; expected some of {', '.join(of_word)}")
        ways = {of_word[word]: ways[of_word[word]] for word in of_word if word in asked}
    found: dict[str, list[Measured]] = {}
    for name, (run, *how) in ways.items():
        found[name] = run_on_ranks(run, work.ranks, work, *how, timeout_seconds=3000)
        seconds = " ".join(f"{second:.1f}" for second in found[name][0].result.seconds)
        print(f"{name}: seconds of the steps {seconds}", flush=True)
    console = Console(width=120, highlight=False)
    table = table_of(
        f"all parameters of {model.name}, pairs: {work.ranks} ranks x {work.rows_per_rank} rows a step",
        *("", "tokens/s", "peak memory, GB", "gathered a step, GB", "before, s", "losses"),
    )
    speeds = {name: tokens_per_second(work, [one.result for one in ranks]) for name, ranks in found.items()}
    peaks = {name: max(one.result.peak_growth_bytes for one in ranks) for name, ranks in found.items()}
    for name, ranks in found.items():
        gathered, losses = ranks[0].gathered, ranks[0].result.losses
        if name == trl:
            losses = losses_over_ranks([one.result for one in ranks])
        table.add_row(
            name,
            f"{speeds[name]:.0f}",
            f"{peaks[name] / 1e9:.2f}",
            "" if gathered is None else f"{gathered / 1e9:.3f}",
            f"{ranks[0].before:.0f}",
            " ".join(f"{loss:.4f}" for loss in losses[: WARM_UP_STEPS + 2]),
        )
    console.print(table)
    bars = list(bars_of(found, peaks, speeds, trl))
    return 1 if report(console, bars) else 0


if __name__ == "__main__":
    sys.exit(main())
