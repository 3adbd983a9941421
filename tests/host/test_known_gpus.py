"""Data sheets of GPUs, and whose they are."""

import pytest

from uft_ds.host.gpus import known_gpus, peak_flops


@pytest.mark.parametrize(
    ("torch_name", "expected"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100-PCIE-40GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("AMD Instinct MI300X", None),
    ],
)
def test_a_peak_is_of_that_very_card(torch_name: str, expected: float | None) -> None:
    """Slower kinds of a card, and parts of one, have no utilisation rather than a wrong one."""
    assert peak_flops(torch_name) == expected


def test_every_card_is_whole() -> None:
    """No figure is lacking, no name is two cards'."""
    gpus = known_gpus().values()
    for gpu in gpus:
        figures = (gpu.memory_gb, gpu.flops_per_second, gpu.hbm_bytes_per_second, gpu.pcie_bytes_per_second)
        assert min(figures) > 0
        assert gpu.nvlink_bytes_per_second > gpu.pcie_bytes_per_second or gpu.name == "L40S"
    names = [name for gpu in gpus for name in gpu.torch_names]
    assert len(names) == len(set(names)) >= len(gpus)
