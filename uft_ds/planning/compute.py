"""Floating-point operations of an optimiser step, and the least time that it can take.

For p parameters in linear layers and T tokens, a forward takes 2 p T; the backward takes 2 p T more through a frozen
weight, and another 2 p T for a trained one. Causal attention over a sequence of t tokens, with q = query heads x head
size, takes 2 q t per token in the forward (QK^T and AV, half of the keys on average) and twice that in the backward.
With sdpa or eager attention every token attends to its whole micro-batch: 4 q times the tokens of a micro-batch.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from uft_ds.planning.hardware import Cluster
from uft_ds.planning.sharding import Sharding
from uft_ds.planning.structure import Structure
from uft_ds.planning.traffic import Traffic
from uft_ds.planning.workload import Workload


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one optimiser step, over all ranks."""

    policy: int
    """Forward and backward through the linear layers: 4 per parameter and token if they are frozen, 6 if trained."""
    reference: int
    """Forward through the linear layers: 2 per parameter and token."""
    recomputation: int
    """By gradient checkpointing: 2 per parameter and token; not counted in `mfu`."""
    attention: int
    """In policy, reference and recomputation together."""
    head: int
    """Log-probs and their gradient for every token: 4 per parameter and token, 8 if the head is trained, 2 more with a
    reference. A reward model has none."""
    adapters: int
    reward_shift: int
    """The additional forwards before the step, with all their parts."""

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


def step_flops(
    structure: Structure, workload: Workload, ranks: int, *, with_reference: bool, extra_streams: int = 0
) -> Flops:
    """Operations of a step of `examples_per_step` responses. extra_streams: forwards before it, see `Workload`."""
    config, tokens = structure.config, workload.tokens_per_step
    layers = sum(structure.active_of(layer) for layer in structure.layers)
    head = 0 if workload.lora.has_reward_head else structure.num_of(structure.head)
    recomputes = workload.gradient_checkpointing is True  # the selective mode recomputes what takes few operations
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    query = config.num_attention_heads * head_dim
    attention = 2 * query * workload.attended_tokens(ranks) * structure.num_layers * tokens
    trains_all = workload.lora.trains_all
    adapters = 0 if trains_all else structure.num_lora
    return Flops(
        policy=(6 if trains_all else 4) * layers * tokens,
        reference=2 * layers * tokens if with_reference else 0,
        recomputation=2 * layers * tokens if recomputes else 0,
        attention=attention * (3 + with_reference + recomputes),
        head=((8 if trains_all else 4) + 2 * with_reference) * head * tokens,
        adapters=(6 + 2 * recomputes) * adapters * tokens,
        reward_shift=extra_streams * (2 * (layers + head) * tokens + attention)
        + (2 * adapters * tokens if extra_streams else 0),
    )


def mfu_flops(structure: Structure, workload: Workload, *, with_reference: bool) -> int:
    """Operations counted by the metric `mfu`; see `record.metrics.model_flops_utilization`."""
    of_policy = 6 if workload.lora.trains_all else 4
    adapters = sum(structure.sizes) - structure.num_base
    return (of_policy + 2 * with_reference) * (structure.num_active + adapters) * workload.tokens_per_step


@dataclass(frozen=True)
class Time:
    """Lower bounds for an optimiser step: each part runs at the hardware's full speed, without gaps."""

    compute_seconds: float
    hbm_seconds: float
    """Time to read each weight once per pass."""
    nvlink_seconds: float
    network_seconds: float
    pcie_seconds: float
    overlaps: bool

    @property
    def bound_seconds(self) -> float:
        """The largest part if communication overlaps computation; otherwise computation plus the slowest link."""
        on_gpu = max(self.compute_seconds, self.hbm_seconds)
        links = max(self.nvlink_seconds, self.network_seconds, self.pcie_seconds)
        return max(on_gpu, links) if self.overlaps else on_gpu + links

    @property
    def serial_seconds(self) -> float:
        """The sum of all parts, without overlap. Alternatives are ordered by it, so that hidden traffic counts too."""
        return self.compute_seconds + self.hbm_seconds + self.links_seconds

    @property
    def links_seconds(self) -> float:
        """The sum over all links."""
        return self.nvlink_seconds + self.network_seconds + self.pcie_seconds

    @property
    def bounded_by(self) -> str:
        """Name of the part that takes longest."""
        of = {key.removesuffix("_seconds"): value for key, value in asdict(self).items() if key.endswith("_seconds")}
        return max(of, key=lambda key: of[key])


def least_time(
    structure: Structure,
    workload: Workload,
    sharding: Sharding,
    cluster: Cluster,
    flops: Flops,
    moved: Traffic,
    *,
    with_reference: bool,
    extra_streams: int = 0,
) -> Time:
    """Time of the rank with the most responses: at least one, even if there are more ranks than responses."""
    busiest = workload.most_responses(cluster.ranks) / workload.examples_per_step / workload.sequence_size
    passes = 2 + (workload.gradient_checkpointing is True) + with_reference + extra_streams
    read = workload.micro_steps(cluster.ranks) * passes * structure.num_read * workload.item_bytes
    gpu = cluster.gpu
    return Time(
        compute_seconds=flops.total * busiest / gpu.flops_per_second,
        hbm_seconds=read / gpu.hbm_bytes_per_second,
        nvlink_seconds=moved.nvlink_bytes / gpu.nvlink_bytes_per_second,
        network_seconds=moved.network_bytes / cluster.network_bytes_per_second,
        pcie_seconds=moved.pcie_bytes / gpu.pcie_bytes_per_second,
        overlaps=sharding.overlaps,
    )
