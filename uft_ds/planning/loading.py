"""Memory that loading a base in NF4 takes before the first step, which may be more than any step takes.

Under ZeRO-3 the base comes in shards of the model's type, as any base, and on GPUs if the file keeps weights there. Its
linear layers are then gathered one by one and coded. The codes wait on the host, whole on every rank, for the engine.
"""

from __future__ import annotations

from collections.abc import Iterator

from uft_ds.planning import parts
from uft_ds.planning.hardware import Cluster, in_gb
from uft_ds.planning.memory import LIBRARIES_BYTES, PROCESS_BYTES
from uft_ds.planning.sharding import Sharding
from uft_ds.planning.structure import ITEM_BYTES, Structure
from uft_ds.planning.workload import Workload


def loading_problems(structure: Structure, workload: Workload, sharding: Sharding, cluster: Cluster) -> Iterator[str]:
    """Why a base in NF4 could not be loaded, in words that say what to take; nothing for a base in 16 bits."""
    if workload.quantization is None:
        return
    item, named = ITEM_BYTES[workload.dtype], f"model.quantization: {workload.quantization}: while the base is loaded, "
    base = [size for size, adapts in zip(structure.sizes, structure.is_adapter, strict=True) if not adapts]
    shards = item * sum(parts.shard(size, cluster.ranks) for size in base) if sharding.shards_weights else 0
    on_gpu = shards + item * max(base) + LIBRARIES_BYTES
    if shards and sharding.weights_on == "gpu" and on_gpu > cluster.gpu_memory_bytes:
        yield (
            f"{named}a GPU holds its shard in {workload.dtype}, and needs {in_gb(on_gpu)} GB of "
            f"{in_gb(cluster.gpu_memory_bytes)}: take deepspeed=zero2, which loads it on the host, "
            "deepspeed=zero3_offload, or more GPUs"
        )
    codes = sum(s for s, in_nf4 in zip(structure.held_sizes, structure.is_in_nf4, strict=True) if in_nf4)
    of_rank = PROCESS_BYTES + codes + structure.constants_bytes + (shards if sharding.weights_on == "cpu" else 0)
    limit = cluster.host_memory_bytes
    if limit is not None and cluster.gpus * of_rank > limit:
        yield (
            f"{named}each of a node's {cluster.gpus} ranks holds all codes in host memory, which needs "
            f"{in_gb(cluster.gpus * of_rank)} GB of {in_gb(limit)}: take fewer GPUs a node"
        )
