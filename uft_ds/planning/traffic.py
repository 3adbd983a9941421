"""Bytes that an optimiser step sends over each kind of link.

An all-gather returns B bytes on each of W ranks, on N nodes of g GPUs:

    received by a GPU                      B (W - 1) / W
    received by a node from other nodes    B (W - 1) / W      if N > 1
    received by a GPU inside its node      B (g - 1) / g

A node receives more than the B (N - 1) / N that it lacks: NCCL gathers in one ring over all ranks, so a node's own
shards leave the node and come back on their way to the ranks that precede them in the ring.

A reduce-scatter moves the same in the opposite direction, an all-reduce both. ZeRO-1 and 2 also gather the updated
parameters.
"""

from __future__ import annotations

from dataclasses import dataclass

from uft_ds.planning import parts
from uft_ds.planning.activations import Activations
from uft_ds.planning.gathers import Gathers
from uft_ds.planning.hardware import Cluster
from uft_ds.planning.sharding import Sharding
from uft_ds.planning.structure import Structure
from uft_ds.planning.workload import Workload


@dataclass(frozen=True)
class Traffic:
    """Traffic of one optimiser step.

    The first two fields are the output of gathers and the input of reductions on a rank; the others are the bytes
    received over a link, in its busier direction.
    """

    gathered_bytes: int
    reduced_bytes: int
    nvlink_bytes: int
    """Per GPU."""
    network_bytes: int
    """Per node."""
    pcie_bytes: int
    """Per GPU, to and from host memory."""


@dataclass(frozen=True)
class _Inside:
    """The ranks of a collective: number of nodes, and GPUs per node."""

    nodes: int
    gpus: int

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus

    def nvlink(self, returned: float) -> float:
        return returned * (self.gpus - 1) / self.gpus

    def network(self, returned: float) -> float:
        return returned * (self.ranks - 1) / self.ranks if self.nodes > 1 else 0.0


def traffic(
    structure: Structure,
    workload: Workload,
    sharding: Sharding,
    cluster: Cluster,
    gathers: Gathers | None,
    activations: Activations,
) -> Traffic:
    """Traffic of one optimiser step. gathers: those of a micro-step under ZeRO-3, None below stage 3."""
    item_bytes, ranks = structure.item_bytes(workload.dtype), cluster.ranks
    micro_steps = workload.micro_steps(ranks)
    everyone = _Inside(cluster.nodes, cluster.gpus)
    nvlink = network = gathered = pcie = 0.0
    if gathers is None:  # below stage 3 the updated adapters are gathered once per step
        updated = parts.adapter_bytes(structure, item_bytes, ranks) * ranks if ranks > 1 else 0
        gathered = updated
        nvlink, network = everyone.nvlink(updated), everyone.network(updated)
    else:
        far, near = parts.step_gathered_bytes(structure, item_bytes, gathers, sharding, ranks, micro_steps)
        inside = _near(sharding.secondary, cluster)
        gathered = far + near
        nvlink = everyone.nvlink(far) + inside.nvlink(near)
        network = everyone.network(far) + inside.network(near)
        # From host memory to its GPU: the copy of a reference always, other weights if they are offloaded.
        of_copy = micro_steps * parts.copy_gathered_bytes(structure, item_bytes, gathers, ranks)
        pcie += of_copy / ranks
        if sharding.weights_on != "gpu":
            own = (far - of_copy) / ranks + near / inside.ranks
            pcie += own if ranks > 1 else micro_steps * _once_more(structure, item_bytes, gathers)
    reduced = micro_steps * parts.reduced_bytes(structure, ranks) if ranks > 1 else 0
    # Below stage 3 DeepSpeed all-reduces (a reduce-scatter plus an all-gather), although each rank keeps only a part.
    crossings = 1 if sharding.shards_weights else 2
    nvlink += crossings * everyone.nvlink(reduced)
    network += crossings * everyone.network(reduced)
    # Ranks that share rows are neighbours, so in one node.
    nvlink += micro_steps * parts.exchanged_bytes(
        structure,
        workload.largest_micro_batch,
        workload.item_bytes,
        ranks=workload.sequence_size,
        passes=workload.attention_passes,
    )
    if sharding.optimizer_on != "gpu":
        pcie += micro_steps * parts.gradient_bytes(structure, ranks)
    if workload.activation_offload:
        pcie += micro_steps * activations.saved_bytes
    return Traffic(round(gathered), reduced, round(nvlink), round(network), round(pcie))


def _near(secondary: int, cluster: Cluster) -> _Inside:
    """The ranks over which a secondary copy is sharded."""
    secondary = min(secondary, cluster.ranks)
    return _Inside(max(1, secondary // cluster.gpus), min(secondary, cluster.gpus))


def _once_more(structure: Structure, item_bytes: tuple[int, ...], gathers: Gathers) -> int:
    """Bytes of the policy that a single rank copies from host memory in a micro-step."""
    times = gathers.times[: len(structure.sizes)]
    return sum(t * s * b for t, s, b in zip(times, structure.held_sizes, item_bytes, strict=True))
