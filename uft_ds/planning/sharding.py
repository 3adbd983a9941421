"""What a DeepSpeed file means for memory and traffic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from uft_ds.planning.gathers import Bounds

Device = Literal["gpu", "cpu", "nvme"]

_DEFAULTS = {
    "reduce_bucket_size": 500_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_max_reuse_distance": 1_000_000_000,
    "stage3_param_persistence_threshold": 100_000,
}
"""DeepSpeed's, 0.19.8."""


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
    is_lossy: bool
    """Weights are rounded for every gather."""

    @property
    def shards_weights(self) -> bool:
        return self.stage == 3


def sharding_of(config: dict[str, Any]) -> Sharding:
    """Of a DeepSpeed file that `read_deepspeed_file` has accepted."""
    zero = config["zero_optimization"]
    number = {key: int(zero.get(key, default)) for key, default in _DEFAULTS.items()}
    stage = int(zero["stage"])
    return Sharding(
        stage=stage,
        bounds=Bounds(
            prefetch=number["stage3_prefetch_bucket_size"],
            max_live=number["stage3_max_live_parameters"],
            max_reuse=number["stage3_max_reuse_distance"],
            persistence=number["stage3_param_persistence_threshold"],
        ),
        reduce_bucket=number["reduce_bucket_size"],
        overlaps=bool(zero.get("overlap_comm", stage == 3)),
        weights_on=_device(zero.get("offload_param")) if stage == 3 else "gpu",
        optimizer_on=_device(zero.get("offload_optimizer")),
        pinned=bool((zero.get("offload_param") or {}).get("pin_memory", False)),
        is_lossy=bool(zero.get("zero_quantized_weights", False)),
        secondary=max(1, int(zero.get("zero_hpz_partition_size", 1))) if stage == 3 else 1,
    )


def _device(section: Any) -> Device:
    device = (section or {}).get("device", "none")
    return {"cpu": "cpu", "nvme": "nvme"}.get(str(device), "gpu")  # type: ignore[return-value]
