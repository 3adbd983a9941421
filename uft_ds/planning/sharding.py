"""The settings of a DeepSpeed file that decide memory and traffic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from uft_ds.engine.zero_section import parsed_zero_section
from uft_ds.planning.gathers import Bounds

Device = Literal["gpu", "cpu", "nvme"]


@dataclass(frozen=True)
class Sharding:
    """The effect of a DeepSpeed file."""

    stage: int
    bounds: Bounds
    reduce_bucket: int
    """In number of elements."""
    overlaps: bool
    """Whether communication overlaps computation."""
    weights_on: Device
    optimizer_on: Device
    pinned: bool
    """Whether weights on the host are in page-locked memory."""
    secondary: int
    """`zero_hpz_partition_size`: number of ranks over which a secondary copy is sharded; gathers read this copy.
    1: there is no secondary copy."""

    @property
    def shards_weights(self) -> bool:
        return self.stage == 3


def sharding_of(config: dict[str, Any]) -> Sharding:
    """The sharding of a file that `read_deepspeed_file` has accepted; DeepSpeed itself parses it and sets defaults."""
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
