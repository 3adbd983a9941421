"""What the functions of `uft plan` predict for a cell of the grid, from its config alone.

Not a benchmark itself: a part of benchmarks/plan.py.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from plan_cells import COPIED, LORA, REWARD_MODEL, TRAINS_ALL, Bytes, Cell, zero3

from uft_ds.data.micro_batch import MicroBatch
from uft_ds.planning import parts
from uft_ds.planning.activations import activations_of
from uft_ds.planning.memory import head_saved_bytes
from uft_ds.planning.sharding import sharding_of
from uft_ds.planning.structure import ITEM_BYTES, Lora, Structure, structure_of
from uft_ds.streams.load import attention_implementation, check_base


def _exchanged(cell: Cell, structure: Structure, step: list[int], item_bytes: int) -> float:
    """Of a micro-step, on average."""
    size = cell.sequence_size
    passes = 2 + (cell.mode == "lockstep") + cell.gradient_checkpointing
    of = [
        parts.exchanged_bytes(structure, -(-tokens // size), item_bytes, ranks=size, passes=passes) for tokens in step
    ]
    return sum(of) / len(of)


def predict(cell: Cell, ranks: int, batch: MicroBatch, step: list[int]) -> Bytes:
    """By the functions of `uft plan`; of the micro-batch only its numbers of tokens are read."""
    is_reward_model = cell.mode == REWARD_MODEL
    lora = replace(LORA, has_reward_head=is_reward_model, targets=cell.targets, experts=cell.experts)
    if cell.mode in (TRAINS_ALL, COPIED):
        lora = Lora.none(cell.dtype, copies_base=cell.mode == COPIED)
    structure = structure_of(check_base(str(cell.folder), None), lora, cell.quantization)
    item_bytes = structure.item_bytes(cell.dtype)
    sharding = sharding_of(zero3(cell))
    one = ITEM_BYTES[cell.dtype]
    in_lockstep = cell.mode == "lockstep"
    passes = 2 if cell.mode in ("separate", COPIED) else 1
    gathers = parts.micro_step_gathers(structure, item_bytes, sharding, passes=passes)
    activations = activations_of(
        structure, lengths=batch.lengths, dtype=cell.dtype, gradient_checkpointing=cell.gradient_checkpointing,
        lockstep=in_lockstep, attention=attention_implementation("auto", getattr(torch, cell.dtype), structure.config),
        under_zero3=True,
    )  # fmt: skip
    micro_steps, size = len(step), cell.sequence_size
    far, near = parts.step_gathered_bytes(structure, item_bytes, gathers, sharding, ranks, micro_steps)
    second = parts.frozen_bytes(structure, item_bytes, cell.secondary) if cell.secondary > 1 else 0
    return Bytes(
        gathered=(far + near) / micro_steps,
        far=far / micro_steps,
        reduced=parts.reduced_bytes(structure, ranks),
        exchanged=_exchanged(cell, structure, step, one),
        weights=parts.weights_bytes(structure, item_bytes, ranks)
        + second
        + parts.copy_bytes(structure, item_bytes, ranks),
        optimizer=parts.adapter_bytes(structure, item_bytes, ranks) + parts.optimizer_bytes(structure, ranks),
        gradients=parts.gradient_bytes(structure, ranks) + parts.bucket_bytes(sharding, one),
        saved=activations.divided(size).saved_bytes
        + (
            0
            if is_reward_model
            else head_saved_bytes(len(batch.targets_N) // size, structure.config.hidden_size, item_bytes=one)
        ),
    )
