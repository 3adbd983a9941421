"""The table of known GPUs (`gpus.json`), for planning and for the share of peak FLOP/s."""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass
from importlib import resources
from typing import Any


@dataclass(frozen=True)
class Gpu:
    """Figures of the makers' documents. Those of links are per GPU, in one direction."""

    name: str
    memory_gb: float
    flops_per_second: float
    """Dense bfloat16 with float32 accumulation, in which GeForce cards and the A10G have half of their float16 rate."""
    hbm_bytes_per_second: float
    """Of its memory, whatever kind that is."""
    nvlink_bytes_per_second: float
    """Of NVLink or Infinity Fabric to the other GPUs of a node; 0 if there is none, or a bridge of two cards only."""
    pcie_bytes_per_second: float
    torch_names: tuple[str, ...]
    """torch's names of the GPUs that reach `flops_per_second`. A part of one does not."""
    source: str
    """The maker's document that has the figures."""


def known_gpus() -> dict[str, Gpu]:
    """The known GPUs by the names that `uft plan --gpu` accepts."""
    return {
        name: Gpu(**values | {"torch_names": tuple(values["torch_names"])})
        for name, values in _table().items()
        if not name.startswith("_")
    }


def gpu_named(name: str) -> Gpu | None:
    """A GPU by its name in the table, its full name or torch's name; case, spaces and the maker's name do not count.

    Its memory may follow: `a100-80`, `h100 80GB`.
    """
    wanted = _plain(name)
    for key, gpu in known_gpus().items():
        with_memory = (f"{key}{gpu.memory_gb:g}", f"{key}{gpu.memory_gb:g}gb")
        if wanted in {_plain(one) for one in (key, gpu.name, *with_memory, *gpu.torch_names)}:
            return gpu
    return None


def by_torch_name(torch_name: str) -> Gpu | None:
    """The GPU that torch calls by this name; None if it is not known."""
    return next((gpu for gpu in known_gpus().values() if torch_name in gpu.torch_names), None)


def lacks_bfloat16(name: str) -> bool:
    """Whether this is the name of a common card that computes no bfloat16."""
    return _plain(name) in {_plain(one) for one in _table()["_without_bfloat16"]}


def peak_flops(torch_name: str) -> float | None:
    """The dense bfloat16 FLOP/s of a GPU, given torch's name of it; None if they are not known."""
    gpu = by_torch_name(torch_name)
    return None if gpu is None else gpu.flops_per_second


@functools.cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads((resources.files("uft_ds") / "host" / "gpus.json").read_text(encoding="utf-8"))
    return table


def _plain(name: str) -> str:
    """`NVIDIA GeForce RTX 4090`, `rtx-4090` and `4090` in one form: rtx4090."""
    letters = re.sub(r"[^a-z0-9]+|nvidia|geforce|tesla|amd|instinct|sxm\d?", "", name.lower())
    return f"rtx{letters}" if re.fullmatch(r"\d{4}(ti)?", letters) else letters
