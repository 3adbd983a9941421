"""GPUs and figures that are given, found on this machine or assumed."""

from typing import Any

import pytest
from plans import cluster, outcome

from uft_ds.errors import UserError
from uft_ds.planning.hardware import Figures, Found, cluster_of


@pytest.mark.parametrize(
    "option", ["gpu_memory", "host_memory", "network_gbits", "pcie_gbytes", "tflops", "nvlink_gbytes"]
)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_figures_are_finite(option: str, value: float) -> None:
    """What is no number of bytes is refused by the option's name."""
    with pytest.raises(UserError, match=f"--{option.replace('_', '-')}: {value} given"):
        cluster(**{option: value})


def test_a_card_that_is_not_known_is_planned_by_its_figures() -> None:
    """Its operations and links take the place of the named one's; without NVLink its neighbours are behind PCIe."""
    known, own = outcome(), outcome(on=cluster(tflops=98.9, nvlink_gbytes=90))
    time, slower = known.by_mode["lockstep"].time, own.by_mode["lockstep"].time
    assert slower.compute_seconds == pytest.approx(10 * time.compute_seconds)
    assert slower.nvlink_seconds == pytest.approx(5 * time.nvlink_seconds)
    on_pcie = outcome(on=cluster(nvlink_gbytes=0, pcie_gbytes=32)).by_mode["lockstep"]
    assert on_pcie.time.nvlink_seconds == pytest.approx(on_pcie.traffic.nvlink_bytes / 32e9)
    with pytest.raises(UserError, match=r"--gpu: .*--tflops"):
        cluster(gpu="l4-of-mine")


@pytest.mark.parametrize(
    ("here", "options", "expected", "assumed"),
    [
        ((), {}, ("H100 80 GB", 8, 80e9), "assumed: no GPU here; --gpu and --gpus say others"),
        ((), {"gpus": 2}, ("H100 80 GB", 2, 80e9), "assumed: no GPU here; --gpu says another"),
        ((), {"gpu": "l4"}, ("L4", 8, 24e9), "8 GPUs a node assumed (--gpus)"),
        ((), {"gpu": "l4", "gpus": 2}, ("L4", 2, 24e9), None),
        (("NVIDIA L4",) * 3, {}, ("L4", 3, 23e9), "this machine's; --gpu and --gpus name others"),
        (("NVIDIA L4",) * 3, {"gpus": 1}, ("L4", 1, 23e9), "this machine's; --gpu names another"),
        (("NVIDIA L4",), {"gpu": "h200"}, ("H200", 8, 141e9), "8 GPUs a node assumed (--gpus)"),
        (("Other",), {}, ("H100 80 GB", 8, 80e9), "assumed: Other of this machine: not one card of the table"),
        (("NVIDIA L4", "NVIDIA A10"), {}, ("H100 80 GB", 8, 80e9), "assumed: NVIDIA L4 and NVIDIA A10 of this machine"),
    ],
)
def test_what_the_options_do_not_say_is_this_machines_or_assumed(
    here: tuple[str, ...], options: dict[str, Any], expected: tuple[str, int, float], assumed: str | None
) -> None:
    """And it is said. A GPU of this machine has the memory that it reports, not that of its data sheet."""
    given = {"gpu": None, "gpus": None} | options
    cards = [Found(name, int(23e9)) for name in here]
    found = cluster_of(nodes=1, figures=Figures(network_gbits=400), here=cards, **given)
    assert (found.gpu.name, found.gpus, found.gpu_memory_bytes) == expected
    assert found.assumed == assumed or (assumed and found.assumed and found.assumed.startswith(assumed))


@pytest.mark.parametrize("name", ["v100", "Tesla T4", "NVIDIA GeForce RTX 2080 Ti"])
def test_a_card_without_bfloat16_is_refused_as_such(name: str) -> None:
    """Not as an unknown one, whose figures could be given."""
    with pytest.raises(UserError, match=f"--gpu: {name} has no bfloat16"):
        cluster(gpu=name)
