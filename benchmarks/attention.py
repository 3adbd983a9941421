"""Attention of packed rows: `packed`, each sequence by itself, against `sdpa` with its mask of all tokens.

    python benchmarks/attention.py [--rounds 3] [--shapes 16x64 32x256] [--prompts 2:188:254 4:188:254]

CPU seconds of one micro-step: forward of policy and reference in lockstep and backward with gradient checkpointing, of
SmolLM2-135M with adapters on all linear layers, float32, one thread. A shape is SEQUENCESxTOKENS; with --prompts,
ANSWERS:PROMPT:ANSWER in tokens, and rows that hold a prompt once are compared with rows that hold it with each answer,
both by `packed`. Both take turns in one process, so that they meet the same load; the table shows the fastest rounds.
The largest difference of a response's log-prob between the two is printed with them.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from models import sequences
from torch import Tensor
from toy import streams_of

from uft_ds.data.example import Response, Sequence
from uft_ds.data.micro_batch import micro_batch
from uft_ds.examples.smollm2 import quickstart_model
from uft_ds.streams.adapters import add_adapters
from uft_ds.streams.model import UFTModel
from uft_ds.streams.stream import logps_of

ATTENTIONS = ("packed", "sdpa")


def model_with(attention: str) -> UFTModel:
    base: Any = AutoModelForCausalLM.from_pretrained(
        quickstart_model(), attn_implementation=attention, dtype=torch.float32
    ).train()
    base.requires_grad_(False)
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return UFTModel(add_adapters(base, rank=16, alpha=32.0, targets="all-linear", dtype=torch.float32, seed=1))


def micro_step(model: UFTModel, batch: Any) -> tuple[float, Tensor]:
    """CPU seconds, and the policy's log-probs of the responses."""
    started = time.process_time()
    logps_R = logps_of(model(batch, streams_of(model, "policy", "reference")), batch)["policy"]
    logps_R.sum().backward()
    seconds = time.process_time() - started
    model.zero_grad()
    return seconds, logps_R.detach()


def answers_to(count: int, prompt: int, answer: int) -> list[Sequence]:
    """Sequences that begin with one prompt."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 40_000, prompt)
    rows = (np.concatenate([tokens, rng.integers(3, 40_000, answer)]).astype(np.int32) for _ in range(count))
    return [Sequence(row, (Response(prompt, len(row), 1.0, "score"),)) for row in rows]


def compare_prompts(model: UFTModel, shapes: list[str], rounds: int) -> None:
    for shape in shapes:
        count, prompt, answer = map(int, shape.split(":"))
        rows = answers_to(count, prompt, answer)
        batches = {share: micro_batch(rows, share_prompts=share) for share in (True, False)}
        seconds: dict[bool, list[float]] = {share: [] for share in batches}
        logps: dict[bool, Tensor] = {}
        for _ in range(rounds):
            for share, batch in batches.items():
                took, logps[share] = micro_step(model, batch)
                seconds[share].append(took)
        shared, alone = (min(seconds[share]) for share in batches)
        tokens = [len(batch.token_ids_T) for batch in batches.values()]
        furthest = float((logps[True] - logps[False]).abs().max())
        print(
            f"{count} answers of {answer} tokens to a prompt of {prompt}: "
            f"shared {shared:.1f} s for {tokens[0]} tokens, "
            f"alone {alone:.1f} s for {tokens[1]}: {alone / shared:.2f} x; "
            f"log-probs differ by {furthest:.1e} nats at most",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shapes", nargs="*", default=["16x64", "32x256"])
    parser.add_argument("--prompts", nargs="*", default=["2:188:254", "4:188:254"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    models = {attention: model_with(attention) for attention in ATTENTIONS}
    compare_prompts(models["packed"], options.prompts, options.rounds)
    for shape in options.shapes:
        count, length = map(int, shape.split("x"))
        batch = micro_batch(sequences(*[length] * count))
        seconds: dict[str, list[float]] = {attention: [] for attention in ATTENTIONS}
        logps: dict[str, Tensor] = {}
        for _ in range(options.rounds):
            for attention, model in models.items():
                took, logps[attention] = micro_step(model, batch)
                seconds[attention].append(took)
        packed, sdpa = (min(seconds[attention]) for attention in ATTENTIONS)
        furthest = float((logps["packed"] - logps["sdpa"]).abs().max())
        print(
            f"{count} sequences of {length} tokens: packed {packed:.1f} s, sdpa {sdpa:.1f} s: {sdpa / packed:.2f} x; "
            f"log-probs differ by {furthest:.1e} nats at most",
            flush=True,
        )


if __name__ == "__main__":
    main()
