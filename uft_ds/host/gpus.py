"""The table of known GPUs (`gpus.json`), for planning and for the share of peak FLOP/s."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from importlib import resources


@dataclass(frozen=True)
class Gpu:
    """Figures of the makers' data sheets. Those of links are per GPU, in one direction."""

    name: str
    memory_gb: float
    flops_per_second: float
    """Dense bfloat16."""
    hbm_bytes_per_second: float
    nvlink_bytes_per_second: float
    """0 if it has no NVLink."""
    pcie_bytes_per_second: float
    torch_names: tuple[str, ...]
    """torch's names of the GPUs that reach `flops_per_second`. An H100 on PCIe, or a part of one, does not."""


@functools.cache
def known_gpus() -> dict[str, Gpu]:
    """The known GPUs by the names that `uft plan --gpu` accepts."""
    text = (resources.files("uft_ds") / "host" / "gpus.json").read_text(encoding="utf-8")
    return {
        name: Gpu(**values | {"torch_names": tuple(values["torch_names"])})
        for name, values in json.loads(text).items()
        if not name.startswith("_")
    }


def peak_flops(torch_name: str) -> float | None:
    """The dense bfloat16 FLOP/s of a GPU, given torch's name of it; None if they are not known."""
    return next((gpu.flops_per_second for gpu in known_gpus().values() if torch_name in gpu.torch_names), None)
