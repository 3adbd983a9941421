"""Bytes that stay on a rank for the whole run, and bytes that a micro-step moves: each a function of sizes alone.

`benchmarks/plan.py` holds these against what DeepSpeed allocates and sends.
"""

from __future__ import annotations

from collections.abc import Sequence

from uft_ds.planning.gathers import Gathers, steady_gathers
from uft_ds.planning.sharding import Sharding
from uft_ds.planning.structure import Structure

FLOAT32_BYTES = 4


def shard(size: int, ranks: int) -> int:
    """Numbers of a parameter that each rank holds; the last ones are padded."""
    return -(-size // ranks)


def weights_bytes(structure: Structure, item_bytes: Sequence[int], ranks: int) -> int:
    """A rank's shard of the frozen base."""
    return _sum(structure, item_bytes, ranks, trainable=False)


def adapter_bytes(structure: Structure, item_bytes: Sequence[int], ranks: int) -> int:
    """A rank's shard of the adapters, in their own type."""
    return _sum(structure, item_bytes, ranks, trainable=True)


def optimizer_bytes(structure: Structure, ranks: int) -> int:
    """A rank's shard of AdamW's two moments and of the master weights, float32.

    Measured: adapters in float32 have master weights of their own, too (0.19.8 compares a device with its name).
    """
    return 3 * FLOAT32_BYTES * _shards(structure, ranks)


def gradient_bytes(structure: Structure, ranks: int) -> int:
    """A rank's shard of the accumulated gradients, float32."""
    return FLOAT32_BYTES * _shards(structure, ranks)


def bucket_bytes(sharding: Sharding, compute_bytes: int) -> int:
    """Buffers in which gradients wait to be reduced: one, or two that take turns at stage 2 with overlap.

    They are of the type that is reduced in, float32, but at stage 2, which gathers them in the model's own.
    """
    buffers = 2 if sharding.stage < 3 and sharding.overlaps else 1
    return buffers * sharding.reduce_bucket * (compute_bytes if sharding.stage == 2 else FLOAT32_BYTES)


def micro_step_gathers(
    structure: Structure,
    item_bytes: Sequence[int],
    sharding: Sharding,
    *,
    passes: int = 1,
    begins_with_forward: bool = True,
) -> Gathers:
    """What ZeRO-3 gathers in a micro-step. passes: 2 where the reference has a forward of its own."""
    return steady_gathers(
        structure.sizes,
        item_bytes,
        structure.forward(passes=passes),
        structure.backward(),
        sharding.bounds,
        begins_with_forward=begins_with_forward,
    )


def gathered_bytes(
    structure: Structure, item_bytes: Sequence[int], gathers: Gathers, ranks: int, *, trainable: bool | None = None
) -> int:
    """What all-gathers return on each rank, padding included; none on a single rank.

    Args:
        trainable: of adapters alone, or of the base alone.
    """
    if ranks == 1:
        return 0
    return sum(
        times * shard(size, ranks) * ranks * one
        for times, size, one, trains in zip(
            gathers.times, structure.sizes, item_bytes, structure.is_trainable, strict=True
        )
        if trainable is None or trains is trainable
    )


def step_gathered_bytes(
    structure: Structure,
    item_bytes: Sequence[int],
    gathers: Gathers,
    sharding: Sharding,
    ranks: int,
    micro_steps: int,
) -> tuple[int, int]:
    """What a step's all-gathers return on each rank: those of all ranks, and those of the ranks of a second copy.

    With `zero_hpz_partition_size` the base is gathered from the second copy alone, which stays: it is frozen. That of
    the adapters is dropped by each update, and made anew by their first gather, which is of all ranks.
    """
    whole = micro_steps * gathered_bytes(structure, item_bytes, gathers, ranks)
    if sharding.secondary == 1 or ranks == 1:
        return whole, 0
    first = sum(
        shard(size, ranks) * ranks * one
        for size, one, trains in zip(structure.sizes, item_bytes, structure.is_trainable, strict=True)
        if trains
    )
    return first, whole - first


def reduced_bytes(structure: Structure, ranks: int) -> int:
    """What a micro-step's reduction of gradients takes in on each rank: the adapters', float32, padding included."""
    return _shards(structure, ranks) * ranks * FLOAT32_BYTES


def _shards(structure: Structure, ranks: int) -> int:
    return sum(shard(s, ranks) for s, trains in zip(structure.sizes, structure.is_trainable, strict=True) if trains)


def _sum(structure: Structure, item_bytes: Sequence[int], ranks: int, *, trainable: bool) -> int:
    return sum(
        shard(size, ranks) * one
        for size, one, trains in zip(structure.sizes, item_bytes, structure.is_trainable, strict=True)
        if trains is trainable
    )
