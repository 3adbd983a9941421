"""What each value of `model.gradient_checkpointing` costs: operations, CPU seconds and memory of a micro-step.

    python benchmarks/recompute.py [--rounds 3] [--sequences 8] [--tokens 64]

SmolLM2-135M with adapters on all linear layers, float32, one thread, packed attention. Operations of forward and
backward are those that torch counts, divided by the frozen parameters and the tokens, without and with the reference in
lockstep. Seconds are with the reference; the modes take turns, and the fastest round counts. Memory is what is alive
between forward and backward of the policy, weights aside. Log-probs and gradients are compared bit by bit.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from models import sequences
from rich.console import Console
from rich.table import Table
from torch import Tensor
from toy import streams_of

from uft_ds.data.micro_batch import MicroBatch, micro_batch
from uft_ds.examples.smollm2 import quickstart_model
from uft_ds.planning.activations import _Live
from uft_ds.streams.adapters import add_adapters
from uft_ds.streams.model import UFTModel
from uft_ds.streams.recompute import Recompute, enable_recompute
from uft_ds.streams.stream import logps_of

MODES: tuple[Recompute, ...] = (False, "selective", True)


def model_with(mode: Recompute) -> UFTModel:
    base: Any = AutoModelForCausalLM.from_pretrained(
        quickstart_model(), attn_implementation="packed", dtype=torch.float32
    ).train()
    base.requires_grad_(False)
    enable_recompute(base, mode)
    return UFTModel(add_adapters(base, rank=16, alpha=32.0, targets="all-linear", dtype=torch.float32, seed=1))


def micro_step(model: UFTModel, batch: MicroBatch, *streams: str) -> Tensor:
    """Log-probs and all gradients, flat."""
    logps_R = logps_of(model(batch, streams_of(model, *streams)), batch)["policy"]
    logps_R.sum().backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return torch.cat([logps_R.detach().float(), *gradients])


def operations(model: UFTModel, batch: MicroBatch, *streams: str) -> float:
    """Of a micro-step, in parts of the frozen parameters times the tokens."""
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    with FlopCounterMode(display=False) as counter:
        micro_step(model, batch, *streams)
    return float(counter.get_total_flops() / frozen / len(batch.token_ids_T))


def held_bytes(model: UFTModel, batch: MicroBatch) -> int:
    with _Live() as live:
        weights = [parameter.detach() for parameter in model.parameters()]
        before = live.now
        logps_R = logps_of(model(batch, streams_of(model, "policy")), batch)["policy"]
        held = live.now - before
    del logps_R, weights
    return held


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(1)
    batch = micro_batch(sequences(*[options.tokens] * options.sequences))
    models = {mode: model_with(mode) for mode in MODES}
    results = {mode: micro_step(model, batch, "policy", "reference") for mode, model in models.items()}
    seconds: dict[Recompute, list[float]] = {mode: [] for mode in MODES}
    for _ in range(options.rounds):
        for mode, model in models.items():
            started = time.process_time()
            micro_step(model, batch, "policy", "reference")
            seconds[mode].append(time.process_time() - started)
    table = Table(title=f"{options.sequences} sequences of {options.tokens} tokens, SmolLM2-135M")
    for column in ("", "operations / (N tokens)", "with reference", "CPU s", "held MB", "same bits as false"):
        table.add_column(column, justify="right")
    for mode, model in models.items():
        table.add_row(
            str(mode).lower(),
            f"{operations(model, batch, 'policy'):.2f}",
            f"{operations(model, batch, 'policy', 'reference'):.2f}",
            f"{min(seconds[mode]):.1f}",
            f"{held_bytes(model, batch) / 1e6:.0f}",
            "yes" if torch.equal(results[mode], results[False]) else "NO",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
