"""Memory of a GPU, of a node's host and of the disk, in bytes by purpose."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from uft_ds.kernels.tiles import tile_of
from uft_ds.planning import parts
from uft_ds.planning.activations import Activations
from uft_ds.planning.gathers import Gathers
from uft_ds.planning.hardware import GB, Cluster
from uft_ds.planning.sharding import Sharding
from uft_ds.planning.structure import Structure
from uft_ds.planning.workload import Workload
from uft_ds.streams.heads import logit_transform_of

# Assumed, not measured: memory of CUDA, cuBLAS and NCCL on a GPU, and the share that allocators lose between blocks.
LIBRARIES_BYTES = 2 * GB
FRAGMENTATION = 0.05
PROCESS_BYTES = 4 * GB
"""Host memory per rank for Python, torch and CUDA; assumed."""

REFERENCE_ENTRY_BYTES = 24
"""Bytes per response in the reference cache."""


@dataclass(frozen=True)
class GpuMemory:
    """Memory of one GPU at the peak of a step."""

    weights_shard_bytes: int
    secondary_shard_bytes: int
    """The copy of the base that is sharded inside a node (`zero_hpz_partition_size`)."""
    gathered_bytes: int
    """Largest amount that ZeRO-3 holds gathered: the current layer, prefetched layers, and receive buffers."""
    adapters_bytes: int
    gradients_bytes: int
    gradient_bucket_bytes: int
    optimizer_bytes: int
    saved_activations_bytes: int
    """Saved between forward and backward, including the head's gradient rows, or its rows if it is trained."""
    layer_bytes: int
    """Inner tensors of the layer that is computed, or recomputed in the backward."""
    streams_bytes: int
    """Hidden states of the reference when the head is reached."""
    head_tile_bytes: int
    """One tile of logits, and the rows from which it is computed."""
    reserve_bytes: int
    """Libraries and fragmentation; assumed."""

    @property
    def transient_bytes(self) -> int:
        """The larger of layer and head memory: they are never in use at the same time."""
        return max(self.layer_bytes, self.streams_bytes + self.head_tile_bytes)

    @property
    def total_bytes(self) -> int:
        either = self.layer_bytes + self.streams_bytes + self.head_tile_bytes
        return sum(asdict(self).values()) - either + self.transient_bytes


@dataclass(frozen=True)
class HostMemory:
    """Host memory of one node."""

    processes_bytes: int
    weights_bytes: int
    reference_bytes: int
    """The reference's copy of the base, where all parameters are trained."""
    page_locking_bytes: int
    """torch rounds each page-locked block up to a power of two."""
    optimizer_bytes: int
    """Optimiser state and gradients, if offloaded to the host; adapters are counted in the weights."""
    activations_bytes: int
    checkpoint_bytes: int
    """The copy of the state that is written in the background."""

    @property
    def total_bytes(self) -> int:
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Disk:
    base_bytes: int
    checkpoint_bytes: int
    """Size of one checkpoint."""
    checkpoints_bytes: int
    """Size of all kept checkpoints and the one that is being written."""
    merged_model_bytes: int
    reference_cache_bytes: int | None
    """None if the recipe does not state the number of responses."""


def gpu_memory(
    structure: Structure,
    workload: Workload,
    sharding: Sharding,
    cluster: Cluster,
    activations: Activations,
    gathers: Gathers | None,
) -> GpuMemory:
    """Memory of one GPU. gathers: of a micro-step under ZeRO-3; None if each GPU holds all weights."""
    item_bytes, ranks = structure.item_bytes(workload.dtype), cluster.ranks
    on_gpu = sharding.weights_on == "gpu"
    weights_ranks = ranks if sharding.shards_weights else 1
    # The constants of a base in NF4 are on the GPU wherever its codes are.
    weights = parts.weights_bytes(structure, item_bytes, weights_ranks) if on_gpu else structure.constants_bytes
    near = min(sharding.secondary, ranks)
    secondary = parts.frozen_bytes(structure, item_bytes, near) if sharding.secondary > 1 else 0
    adapters = parts.adapter_bytes(structure, item_bytes, weights_ranks) if on_gpu else 0
    if not sharding.shards_weights:
        weights += parts.copy_bytes(structure, item_bytes, 1)
    # On a single GPU that holds the weights, a gathered parameter is its own shard. Those of a reference's copy are
    # not; its peak is taken for the whole.
    has_own = ranks == 1 and on_gpu and not structure.lora.copies_base
    gathered = 0 if gathers is None or has_own else gathers.peak_bytes
    with_optimizer = sharding.optimizer_on == "gpu"
    gradients = parts.gradient_bytes(structure, ranks) if with_optimizer else 0
    if sharding.stage < 3:  # each rank holds complete gradients until they are reduced
        gradients += parts.adapter_bytes(structure, item_bytes, 1)
    hidden = structure.config.hidden_size
    head_saved = head_saved_bytes(workload.largest_micro_batch, hidden, item_bytes=workload.item_bytes)
    if workload.lora.has_reward_head:
        head_saved = 0  # one row a response
    streams = activations.stream_bytes
    # Of a trained module the whole gradient is there, until it is copied into the bucket.
    of_layer, of_head = _whole_gradients(structure, item_bytes)
    held = {
        "weights_shard_bytes": weights,
        "secondary_shard_bytes": secondary if on_gpu else 0,
        "gathered_bytes": gathered,
        "adapters_bytes": adapters,
        "gradients_bytes": gradients,
        "gradient_bucket_bytes": parts.bucket_bytes(sharding, workload.item_bytes),
        "optimizer_bytes": parts.optimizer_bytes(structure, ranks) if with_optimizer else 0,
        "saved_activations_bytes": head_saved + (0 if workload.activation_offload else activations.saved_bytes),
        "layer_bytes": activations.layer_bytes + of_layer + structure.decoded_bytes(workload.dtype),
        "streams_bytes": streams,
        "head_tile_bytes": head_tile_bytes(structure, workload) + of_head,
    }
    without_reserve = GpuMemory(**held, reserve_bytes=0).total_bytes
    return GpuMemory(**held, reserve_bytes=LIBRARIES_BYTES + round(FRAGMENTATION * without_reserve))


def _whole_gradients(structure: Structure, item_bytes: tuple[int, ...]) -> tuple[int, int]:
    """Bytes of the gradients of the largest layer, and of the head, if all parameters are trained; else adapters' are
    too small to count."""
    if not structure.lora.trains_all:
        return 0, 0
    of = [sum(structure.sizes[p] * item_bytes[p] for p in module) for module in (*structure.layers, structure.head)]
    return max(of[:-1]), of[-1]


def head_saved_bytes(num_supervised: int, hidden_size: int, *, item_bytes: int) -> int:
    """Bytes that the head saves for the backward: a gradient row and 16 bytes of position per supervised token."""
    return num_supervised * (hidden_size * item_bytes + 2 * 8)


def head_tile_bytes(structure: Structure, workload: Workload) -> int:
    """Memory of `kernels/` if every token is supervised: logits, float32 rows of a chunk, and both streams' rows.

    A reward model has no logits.
    """
    if workload.lora.has_reward_head:
        return 0
    config = structure.config
    # A copy of the base has a head of its own, which is done before the policy's.
    streams = 1 if workload.reference == "none" or workload.lora.copies_base else 2
    capped = logit_transform_of(config).softcap is not None
    tokens, hidden, one = workload.largest_micro_batch, int(config.hidden_size), workload.item_bytes
    per_logit = 4 * (1 + capped)
    tile = tile_of(
        tokens,
        streams,
        int(config.vocab_size),
        torch.device("cuda"),
        chunk_bytes=workload.logits_bytes,
        bytes_per_logit=per_logit,
    )
    logits = streams * tile.rows * tile.width * per_logit
    chunk = 3 * tile.rows * hidden * 4 + streams * tile.rows * hidden * one
    return logits + chunk + streams * tokens * hidden * one


def host_memory(
    structure: Structure, workload: Workload, sharding: Sharding, cluster: Cluster, activations: Activations
) -> HostMemory:
    """Host memory of one node. The system's page cache is not counted, because it can be reclaimed."""
    item_bytes, ranks, gpus = structure.item_bytes(workload.dtype), cluster.ranks, cluster.gpus
    weights = locking = 0
    if sharding.weights_on == "cpu":
        sizes = structure.held_sizes
        shards = [parts.shard(size, ranks) * one for size, one in zip(sizes, item_bytes, strict=True)]
        if sharding.secondary > 1:
            shards += [
                parts.shard(size, min(sharding.secondary, ranks)) * one
                for size, one, trains in zip(sizes, item_bytes, structure.is_trainable, strict=True)
                if not trains
            ]
        weights = gpus * sum(shards)
        locking = gpus * sum(_power_of_two(b) - b for b in shards) if sharding.pinned else 0
    of_copy = parts.copy_shards(structure, item_bytes, ranks) if sharding.shards_weights else []
    locking += gpus * sum(_power_of_two(b) - b for b in of_copy)
    offloaded = sharding.optimizer_on == "cpu"
    optimizer = parts.optimizer_bytes(structure, ranks) + parts.gradient_bytes(structure, ranks) if offloaded else 0
    activation_bytes = gpus * activations.saved_bytes if workload.activation_offload else 0
    copy = gpus * parts.optimizer_bytes(structure, ranks) + _adapter_file_bytes(structure, item_bytes)
    return HostMemory(
        gpus * PROCESS_BYTES, weights, gpus * sum(of_copy), locking, gpus * optimizer, activation_bytes, copy
    )


def _adapter_file_bytes(structure: Structure, item_bytes: tuple[int, ...]) -> int:
    """The adapter in a checkpoint, beside the optimiser's state; there is none if all parameters are trained."""
    return 0 if structure.lora.trains_all else parts.adapter_bytes(structure, item_bytes, 1)


def _power_of_two(num_bytes: int) -> int:
    return 1 << max(0, num_bytes - 1).bit_length()


def disk(structure: Structure, workload: Workload) -> Disk:
    """Disk space of everything that a run writes, and of the base that it reads."""
    item_bytes = structure.item_bytes(workload.dtype)
    checkpoint = _adapter_file_bytes(structure, item_bytes) + parts.optimizer_bytes(structure, 1)
    base = structure.num_base * workload.item_bytes
    responses = workload.num_responses if workload.caches_reference else 0
    return Disk(
        base_bytes=base,
        checkpoint_bytes=checkpoint,
        checkpoints_bytes=checkpoint * (workload.kept_checkpoints + 1),
        merged_model_bytes=base,
        reference_cache_bytes=None if responses is None else responses * REFERENCE_ENTRY_BYTES,
    )
