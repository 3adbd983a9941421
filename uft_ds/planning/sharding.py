"""What a DeepSpeed file means for memory and traffic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from uft_ds.engine.zero_section import parsed_zero_section
from uft_ds.planning.gathers import Bounds

Device = Literal["gpu", "cpu", "nvme"]


@dataclass(frozen=True)
class Sharding:
    """A DeepSpeed file, by what it does."""

    stage: int
    bounds: Bounds
    reduce_bucket: int
    """In numbers."""
    overlaps: bool
    """Whether communication runs beside computation."""
    weights_on: Device
    optimizer_on: Device
    pinned: bool
    """Weights on the host lie in page-locked memory."""
    secondary: int
    """`zero_hpz_partition_size`: ranks of a node among which a second copy is sharded, which is the one that is
    gathered; 1: there is none."""

    @property
    def shards_weights(self) -> bool:
        return self.stage == 3


def sharding_of(config: dict[str, Any]) -> Sharding:
    """Of a DeepSpeed file that `read_deepspeed_file` has accepted; DeepSpeed itself says what its keys mean."""
    zero = parsed_zero_section(config["zero_optimization"])
    stage = int(zero.stage)
    return Sharding(
        stage=stage,
        bounds=Bounds(
            prefetch=zero.prefetch_bucket_size,
            max_live=zero.max_live_parameters,
            max_reuse=zero.max_reuse_distance,
            persistence=zero.param_persistence_threshold,
        ),
        reduce_bucket=zero.reduce_bucket_size,
        overlaps=zero.overlap_comm,
        weights_on=_device(zero.offload_param) if stage == 3 else "gpu",
        optimizer_on=_device(zero.offload_optimizer),
        pinned=zero.offload_param is not None and zero.offload_param.pin_memory,
        secondary=max(1, zero.zero_hpz_partition_size) if stage == 3 else 1,
    )


def _device(offload: Any) -> Device:
    if offload is None or offload.device == "none":
        return "gpu"
    return "nvme" if offload.device == "nvme" else "cpu"
