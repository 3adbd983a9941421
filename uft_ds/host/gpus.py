"""GPUs whose data sheets are known."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from importlib import resources


@dataclass(frozen=True)
class Gpu:
    """From the makers' data sheets (`gpus.json`); a link's figure is of one direction, of one GPU."""

    name: str
    memory_gb: float
    flops_per_second: float
    """Dense, bfloat16."""
    hbm_bytes_per_second: float
    nvlink_bytes_per_second: float
    """0: it has none."""
    pcie_bytes_per_second: float
    torch_names: tuple[str, ...]
    """What torch calls those that reach `flops_per_second`: an H100 on PCIe, or a part of one, does not."""


@functools.cache
def known_gpus() -> dict[str, Gpu]:
    """By the names that `uft plan --gpu` takes."""
    text = (resources.files("uft_ds") / "host" / "gpus.json").read_text(encoding="utf-8")
    return {
        name: Gpu(**values | {"torch_names": tuple(values["torch_names"])})
        for name, values in json.loads(text).items()
        if not name.startswith("_")
    }


def peak_flops(torch_name: str) -> float | None:
    """Dense bfloat16 FLOP/s of a GPU by torch's name for it; None where they are not known."""
    return next((gpu.flops_per_second for gpu in known_gpus().values() if torch_name in gpu.torch_names), None)
