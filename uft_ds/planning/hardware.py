"""The hardware of a plan: nodes, GPUs per node, their memory and their links, from the command's options."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

from uft_ds.errors import UserError
from uft_ds.host.gpus import Gpu, by_torch_name, gpu_named, known_gpus, lacks_bfloat16
from uft_ds.recipe.names import unknown_name

GB = 10**9
"""Bytes per GB, in all of a plan."""


def in_gb(num_bytes: int) -> str:
    """A size as text, in GB; small ones with more digits."""
    return f"{num_bytes / GB:.1f}" if abs(num_bytes) >= GB / 20 or num_bytes == 0 else f"{num_bytes / GB:.3f}"


@dataclass(frozen=True)
class Cluster:
    """The hardware that a run is planned for."""

    nodes: int
    gpus: int
    """Per node."""
    gpu: Gpu
    gpu_memory_bytes: int
    host_memory_bytes: int | None
    """Per node; None: not known."""
    network_bytes_per_second: float
    """Per node, in one direction, all its network adapters together."""
    has_own_flops: bool = False
    """Whether the GPU's FLOP/s are given by an option, for the model's type, and not those of bfloat16."""
    assumed: str | None = None
    """What the command's options do not say and where it is from, for the user; None if they say all of it."""

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus


@dataclass(frozen=True)
class Figures:
    """Hardware figures from the command's options; None: the value in the table of known GPUs.

    network_gbits: Gbit/s per node. gpu_memory: GB per GPU. host_memory: GB per node; None: no limit.
    pcie_gbytes: GB/s, one direction.
    tflops: dense, in the model's dtype.
    nvlink_gbytes: GB/s, one direction; 0: GPUs of a node reach each other over PCIe.
    """

    network_gbits: float
    gpu_memory: float | None = None
    host_memory: float | None = None
    pcie_gbytes: float | None = None
    tflops: float | None = None
    nvlink_gbytes: float | None = None


ASSUMED_GPU, ASSUMED_GPUS = "h100", 8
"""A node of these is planned for if neither the options nor this machine say another one."""


@dataclass(frozen=True)
class Found:
    """A GPU of this machine: torch's name of it, and its memory."""

    torch_name: str
    memory_bytes: int


def found_here() -> tuple[Found, ...]:
    """The GPUs that torch sees on this machine."""
    import torch

    if not torch.cuda.is_available():
        return ()
    cards = (torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count()))
    return tuple(Found(card.name, card.total_memory) for card in cards)


def cluster_of(
    *, nodes: int, gpus: int | None, gpu: str | None, figures: Figures, here: Iterable[Found] = ()
) -> Cluster:
    """The cluster described by the command's options; where they do not say it, this machine's GPUs, or 8 x H100.

    Args:
        gpus: number of GPUs per node.
        here: the GPUs of this machine.
    Raises:
        UserError: the GPU is unknown or has no bfloat16, or a figure is not a finite number.
    """
    for option, value in {
        "--gpu-memory": figures.gpu_memory,
        "--host-memory": figures.host_memory,
        "--network-gbits": figures.network_gbits,
        "--pcie-gbytes": figures.pcie_gbytes,
        "--tflops": figures.tflops,
        "--nvlink-gbytes": figures.nvlink_gbytes,
    }.items():
        if value is not None and not math.isfinite(value):
            raise UserError(f"{option}: {value} given, expected a finite number")
    card, memory_bytes, count, assumed = _cards(gpu, gpus, tuple(here))
    if figures.pcie_gbytes is not None:
        card = replace(card, pcie_bytes_per_second=figures.pcie_gbytes * GB)
    if figures.tflops is not None:
        card = replace(card, flops_per_second=figures.tflops * 1e12)
    nvlink = card.nvlink_bytes_per_second if figures.nvlink_gbytes is None else figures.nvlink_gbytes * GB
    card = replace(card, nvlink_bytes_per_second=nvlink or card.pcie_bytes_per_second)
    return Cluster(
        nodes=nodes,
        gpus=count,
        gpu=card,
        gpu_memory_bytes=memory_bytes if figures.gpu_memory is None else round(figures.gpu_memory * GB),
        host_memory_bytes=None if figures.host_memory is None else round(figures.host_memory * GB),
        network_bytes_per_second=figures.network_gbits * GB / 8,
        has_own_flops=figures.tflops is not None,
        assumed=assumed,
    )


def _cards(gpu: str | None, gpus: int | None, here: tuple[Found, ...]) -> tuple[Gpu, int, int, str | None]:
    """The card, its memory in bytes, how many of it a node has, and what of these the options do not say."""
    known = known_gpus()
    if gpu is not None:
        card = _named(gpu)
        count = gpus or ASSUMED_GPUS
        return card, round(card.memory_gb * GB), count, None if gpus else f"{count} GPUs a node assumed (--gpus)"
    own = by_torch_name(here[0].torch_name) if here else None
    if own is not None and len(Counter(found.torch_name for found in here)) == 1:
        said = "--gpu names another" if gpus else "--gpu and --gpus name others"
        return own, min(found.memory_bytes for found in here), gpus or len(here), f"this machine's; {said}"
    why = "no GPU here"
    if here:
        why = f"{' and '.join(Counter(found.torch_name for found in here))} of this machine: not one card of the table"
    card, count = known[ASSUMED_GPU], gpus or ASSUMED_GPUS
    options = "--gpu says another" if gpus else "--gpu and --gpus say others"
    return card, round(card.memory_gb * GB), count, f"assumed: {why}; {options}"


def _named(gpu: str) -> Gpu:
    card = gpu_named(gpu)
    if card is not None:
        return card
    own_figures = "--gpu-memory, --tflops, --nvlink-gbytes and --pcie-gbytes"
    if lacks_bfloat16(gpu):
        raise UserError(
            f"--gpu: {gpu} has no bfloat16, the type of the shipped recipes and of the figures here: NVIDIA's cards "
            f"have it from Ampere on (A100, A10, RTX 3090); for model.dtype=float32 name one of "
            f"{', '.join(known_gpus())} and give the figures of your own by {own_figures}"
        )
    raise UserError(
        f"--gpu: {unknown_name(gpu, tuple(known_gpus()))}; for another card, name the nearest and "
        f"give its own figures by {own_figures}"
    )
