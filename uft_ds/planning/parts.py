"""Bytes that a rank holds for the whole run, and bytes that a micro-step moves, computed from parameter sizes.

`benchmarks/plan.py` compares these with what DeepSpeed allocates and sends.
"""

from __future__ import annotations

from collections.abc import Sequence

from uft_ds.planning.gathers import Gathers, steady_gathers
from uft_ds.planning.sharding import Sharding
from uft_ds.planning.structure import Structure

FLOAT32_BYTES = 4


def shard(size: int, ranks: int) -> int:
    """Elements of a parameter that each rank holds; the last rank's part is padded."""
    return -(-size // ranks)


def weights_bytes(structure: Structure, item_bytes: Sequence[int], ranks: int) -> int:
    """A rank's shard of the frozen base, and the constants of one in NF4."""
    return frozen_bytes(structure, item_bytes, ranks) + structure.constants_bytes


def frozen_bytes(structure: Structure, item_bytes: Sequence[int], ranks: int) -> int:
    """A rank's shard of the frozen base, or of a second one inside a node, which needs no constants of its own."""
    return _sum(structure, item_bytes, ranks, trainable=False)


def copy_bytes(structure: Structure, item_bytes: Sequence[int], ranks: int) -> int:
    """A rank's shard of the reference's copy of the base; 0 if there is none."""
    return sum(copy_shards(structure, item_bytes, ranks))


def copy_shards(structure: Structure, item_bytes: Sequence[int], ranks: int) -> list[int]:
    """The bytes of each parameter's shard in the copy; empty if there is none."""
    if not structure.lora.copies_base:
        return []
    return [shard(size, ranks) * one for size, one in zip(structure.sizes, item_bytes, strict=True)]


def adapter_bytes(structure: Structure, item_bytes: Sequence[int], ranks: int) -> int:
    """A rank's shard of the adapters, in their own dtype."""
    return _sum(structure, item_bytes, ranks, trainable=True)


def optimizer_bytes(structure: Structure, ranks: int) -> int:
    """A rank's shard of AdamW's two moments and of the master weights, float32.

    Measured: float32 adapters have separate master weights too (DeepSpeed 0.19.8 compares a device with its name).
    """
    return 3 * FLOAT32_BYTES * _shards(structure, ranks)


def gradient_bytes(structure: Structure, ranks: int) -> int:
    """A rank's shard of the accumulated gradients, float32."""
    return FLOAT32_BYTES * _shards(structure, ranks)


def bucket_bytes(sharding: Sharding, compute_bytes: int) -> int:
    """Buffers of gradients before their reduction: one, or two alternating ones below stage 3 with overlap.

    Their dtype is that of the reduction, float32, except at stage 2, which uses the model's dtype.
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
    """Gathers of a micro-step under ZeRO-3. passes: 2 if the reference has a separate forward."""
    return steady_gathers(
        structure.gathered_sizes,
        gathered_item_bytes(structure, item_bytes),
        structure.forward(passes=passes),
        structure.backward(),
        sharding.bounds,
        begins_with_forward=begins_with_forward,
    )


def gathered_item_bytes(structure: Structure, item_bytes: Sequence[int]) -> tuple[int, ...]:
    """Bytes per element of each of `Structure.gathered_sizes`. item_bytes: those of the policy's parameters."""
    return (*item_bytes, *item_bytes) if structure.lora.copies_base else tuple(item_bytes)


def copy_gathered_bytes(structure: Structure, item_bytes: Sequence[int], gathers: Gathers, ranks: int) -> int:
    """Bytes of the copy that a micro-step gathers on each rank, including padding; on a single rank those it fetches
    from host memory. 0 if there is no copy.
    """
    times = gathers.times[len(structure.sizes) :]
    return sum(
        n * shard(size, ranks) * ranks * one for n, size, one in zip(times, structure.sizes, item_bytes, strict=False)
    )


def gathered_bytes(
    structure: Structure, item_bytes: Sequence[int], gathers: Gathers, ranks: int, *, trainable: bool | None = None
) -> int:
    """Bytes of the policy that a micro-step's all-gathers return on each rank, with padding; 0 on a single rank.

    Args:
        trainable: True: only adapters; False: only the base; None: both.
    """
    if ranks == 1:
        return 0
    return sum(
        times * shard(size, ranks) * ranks * one
        for times, size, one, trains in zip(
            gathers.times[: len(structure.sizes)],
            structure.held_sizes,
            item_bytes,
            structure.is_trainable,
            strict=True,
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
    """Bytes that a step's all-gathers return on each rank: (over all ranks, over the ranks of a secondary copy).

    A reference's copy of the base is always gathered over all ranks.

    With `zero_hpz_partition_size` the base is gathered only from the secondary copy, which stays valid because the
    base is frozen. Each update invalidates the adapters' secondary copy; their next gather, over all ranks, renews it.
    """
    whole = micro_steps * gathered_bytes(structure, item_bytes, gathers, ranks)
    of_copy = micro_steps * copy_gathered_bytes(structure, item_bytes, gathers, ranks) if ranks > 1 else 0
    if sharding.secondary == 1 or ranks == 1:
        return whole + of_copy, 0
    first = sum(
        shard(size, ranks) * ranks * one
        for size, one, trains in zip(structure.held_sizes, item_bytes, structure.is_trainable, strict=True)
        if trains
    )
    return first + of_copy, whole - first


def exchanged_bytes(structure: Structure, tokens: int, item_bytes: int, *, ranks: int, passes: int) -> int:
    """Bytes that a rank receives in a micro-step from those that it shares rows with: queries, keys, values, outputs.

    Args:
        tokens: that the rank computes itself. ranks: that share the row. passes: through the attention.
    """
    config = structure.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    of_token = 2 * (heads + key_heads) * head * item_bytes
    return passes * structure.num_layers * tokens * of_token * (ranks - 1) // ranks


def reduced_bytes(structure: Structure, ranks: int) -> int:
    """Input bytes of a micro-step's gradient reduction on each rank: the adapters' gradients, float32, with padding."""
    return _shards(structure, ranks) * ranks * FLOAT32_BYTES


def _shards(structure: Structure, ranks: int) -> int:
    return sum(
        shard(s, ranks) for s, trains in zip(structure.held_sizes, structure.is_trainable, strict=True) if trains
    )


def _sum(structure: Structure, item_bytes: Sequence[int], ranks: int, *, trainable: bool) -> int:
    return sum(
        shard(size, ranks) * one
        for size, one, trains in zip(structure.held_sizes, item_bytes, structure.is_trainable, strict=True)
        if trains is trainable
    )
