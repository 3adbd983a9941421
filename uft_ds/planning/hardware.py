"""The hardware of a plan: nodes, GPUs per node, their memory and their links, from the command's options."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from uft_ds.errors import UserError
from uft_ds.host.gpus import Gpu, known_gpus
from uft_ds.recipe.names import unknown_name

GB = 10**9
"""Bytes per GB, in all of a plan."""


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


def cluster_of(*, nodes: int, gpus: int, gpu: str, figures: Figures) -> Cluster:
    """The cluster described by the command's options.

    Args:
        gpus: number of GPUs per node.
    Raises:
        UserError: the GPU is unknown, or a figure is not a finite number.
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
    known = known_gpus()
    if gpu not in known:
        raise UserError(
            f"--gpu: {unknown_name(gpu, tuple(known))}; for another card, name the nearest and "
            "give its own figures by --gpu-memory, --tflops, --nvlink-gbytes and --pcie-gbytes"
        )
    card = known[gpu]
    if figures.pcie_gbytes is not None:
        card = replace(card, pcie_bytes_per_second=figures.pcie_gbytes * GB)
    if figures.tflops is not None:
        card = replace(card, flops_per_second=figures.tflops * 1e12)
    nvlink = card.nvlink_bytes_per_second if figures.nvlink_gbytes is None else figures.nvlink_gbytes * GB
    card = replace(card, nvlink_bytes_per_second=nvlink or card.pcie_bytes_per_second)
    return Cluster(
        nodes=nodes,
        gpus=gpus,
        gpu=card,
        gpu_memory_bytes=round((card.memory_gb if figures.gpu_memory is None else figures.gpu_memory) * GB),
        host_memory_bytes=None if figures.host_memory is None else round(figures.host_memory * GB),
        network_bytes_per_second=figures.network_gbits * GB / 8,
    )
