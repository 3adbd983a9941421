"""Data sheets of GPUs, and whose they are."""

import re

import pytest

from uft_ds.host.gpus import gpu_named, known_gpus, lacks_bfloat16, peak_flops


@pytest.mark.parametrize(
    ("torch_name", "expected"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100-PCIE-40GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GH200 120GB", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("AMD Instinct MI300X", 1307.4e12),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ],
)
def test_a_peak_is_of_that_very_card(torch_name: str, expected: float | None) -> None:
    """Slower kinds of a card, and parts of one, have no utilisation rather than a wrong one."""
    assert peak_flops(torch_name) == expected


def test_every_card_is_whole() -> None:
    """No figure is lacking, no name is two cards', and each has the document that it is from."""
    gpus = known_gpus().values()
    for gpu in gpus:
        figures = (gpu.memory_gb, gpu.flops_per_second, gpu.hbm_bytes_per_second, gpu.pcie_bytes_per_second)
        assert min(figures) > 0
        assert gpu.nvlink_bytes_per_second == 0 or gpu.nvlink_bytes_per_second >= gpu.pcie_bytes_per_second
        assert re.search("data sheet|whitepaper", gpu.source)
    names = [name for gpu in gpus for name in gpu.torch_names]
    assert len(names) == len(set(names)) >= len(gpus)


@pytest.mark.parametrize(
    ("key", "tensor_cores", "boost_ghz", "rate"),
    [
        ("rtx3090", 328, 1.695, 1 / 2),
        ("rtx4090", 512, 2.52, 1 / 2),
        ("rtx5090", 680, 2.407, 1 / 2),
        ("a10g", 320, 1.71, 1 / 2),
        ("l40", 568, 2.49, 1 / 2),
        ("a10", 288, 1.695, 1),
        ("a40", 336, 1.74, 1),
        ("a6000", 336, 1.8, 1),
        ("l40s", 568, 2.52, 1),
        ("rtx6000-ada", 568, 2.505, 1),
        ("rtx-pro-6000", 752, 2.617, 1),
    ],
)
def test_flops_are_those_with_float32_accumulation(key: str, tensor_cores: int, boost_ghz: float, rate: float) -> None:
    """A tensor core of these cards multiplies and adds 128 dense pairs a cycle, half as many on GeForce if it
    accumulates in float32: RTX 4090, 512 x 128 x 2 x 2.52 GHz / 2 = 165 TFLOP/s, not 330 and not 661."""
    assert known_gpus()[key].flops_per_second == pytest.approx(tensor_cores * 256 * boost_ghz * 1e9 * rate, rel=0.015)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("rtx4090", "RTX 4090"),
        ("RTX 4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("4090", "RTX 4090"),
        ("H100", "H100 80 GB"),
        ("a100-80gb", "A100 80 GB"),
        ("NVIDIA A100 80GB PCIe", "A100 PCIe 80 GB"),
        ("NVIDIA A100-PCIE-40GB", "A100 PCIe 40 GB"),
        ("a100-80", "A100 80 GB"),  # as a100-40 is written
        ("a100-40", "A100 40 GB"),
        ("h100 80 GB", "H100 80 GB"),
        ("GH200 480GB", "GH200 96 GB"),  # the 480 are the host's
        ("rtx-a6000", "RTX A6000"),
        ("rtx6000", None),  # of Turing, Ada or Blackwell
        ("h1000", None),
    ],
)
def test_a_card_is_found_by_any_spelling_of_its_name(given: str, expected: str | None) -> None:
    """But by no other card's."""
    found = gpu_named(given)
    assert (found and found.name) == expected


def test_cards_without_bfloat16_are_known_as_such() -> None:
    """V100 and T4 are common in clouds; no card of the table is among them."""
    assert all(map(lacks_bfloat16, ("v100", "Tesla T4", "NVIDIA GeForce RTX 2080 Ti", "Tesla V100-SXM2-16GB")))
    assert not any(map(lacks_bfloat16, [*known_gpus(), *(gpu.name for gpu in known_gpus().values()), "rtx6000"]))
