"""GPUs as nvidia-smi describes them; the texts are of its own form."""

from collections.abc import Callable, Sequence

import pytest

from uft_ds.doctor.gpus import TorchBuild, check_gpus, check_peers, check_torch

CUDA = TorchBuild("2.13.0+cu128", "12.8", 2)


def smi(driver: str) -> Callable[[Sequence[str]], str]:
    return lambda _: f"| NVIDIA-SMI 550.54   Driver Version: 550.54   CUDA Version: {driver}  |\n"


@pytest.mark.parametrize(
    ("build", "driver", "state", "expected"),
    [
        (TorchBuild("2.13.0+cpu", None, 0), None, "ok", "two CPU processes"),
        (TorchBuild("2.13.0+cpu", None, 0), "12.8", "problem", "is a CPU build, but the driver serves CUDA 12.8"),
        (
            TorchBuild("2.13.0+cu130", "13.0", 0),
            "12.8",
            "problem",
            "built for CUDA 13.0, but the driver serves CUDA 12.8",
        ),
        (CUDA, "12.4", "ok", "2 GPUs"),  # the same major version
        (CUDA, "13.0", "ok", "2 GPUs"),
        (TorchBuild("2.13.0+cu128", "12.8", 0), "12.8", "problem", "sees no GPU"),
    ],
)
def test_torchs_build_and_the_driver(build: TorchBuild, driver: str | None, state: str, expected: str) -> None:
    """A driver serves builds up to its own major version; a CPU build beside a driver is a mistake."""
    finding = check_torch(build, smi(driver) if driver else lambda _: None)
    assert finding.state == state
    assert expected in finding.found
    assert bool(finding.remedy) == (state == "problem")


def test_each_gpu_is_described() -> None:
    """One idle, one in use by others, one with errors, one that allows no process, one without error counters."""
    rows = (
        "0, GPU-0a, NVIDIA H100 80GB HBM3, 81559, 4, 0, Default\n"
        "1, GPU-1a, NVIDIA H100 80GB HBM3, 81559, 40960, 0, Default\n"
        "2, GPU-2a, NVIDIA H100 80GB HBM3, 81559, 4, 3, Default\n"
        "3, GPU-3a, NVIDIA H100 80GB HBM3, 81559, 4, 0, Prohibited\n"
        "4, GPU-4a, NVIDIA GeForce RTX 4090, 24564, 4, [N/A], Default\n"
    )

    def ask(command: Sequence[str]) -> str:
        asked = command[1]
        if asked.startswith("--query-gpu=index,gpu_uuid,name,"):
            return rows
        assert asked == "--query-compute-apps=gpu_uuid,pid"
        return "GPU-1a, 4711\n"

    idle, used, erring, closed, plain = check_gpus(ask)
    assert [finding.state for finding in (idle, used, erring, closed, plain)] == [
        "ok",
        "note",
        "problem",
        "problem",
        "ok",
    ]
    assert idle.found == "NVIDIA H100 80GB HBM3, 0.0 of 79.6 GiB taken"
    assert "40.0 of 79.6 GiB taken (processes: 4711)" in used.found
    assert "3 uncorrected memory errors" in erring.found
    assert "nvidia-smi -i 3 -c DEFAULT" in closed.remedy
    assert check_gpus(lambda _: None) == []


def test_a_process_is_told_with_its_own_gpu() -> None:
    """Two GPUs in use: the first by one process, the second by two; a third's are not visible."""
    rows = "".join(f"{i}, GPU-{i}a, NVIDIA A100-SXM4-40GB, 40960, 30000, 0, Default\n" for i in range(3))
    apps = "GPU-1a, 12\nGPU-0a, 11\nGPU-1a, 13\n"
    findings = check_gpus(lambda command: rows if "--query-gpu" in command[1] else apps)
    told = [finding.found.partition("processes: ")[2] for finding in findings]
    assert told == ["11)", "12, 13)", "not visible from here)"]


def test_gpus_that_cannot_reach_each_other() -> None:
    """Pairs are named; a single GPU has none."""
    assert check_peers(1) == []
    assert check_peers(4, lambda i, j: True)[0].state == "ok"
    (note,) = check_peers(4, lambda i, j: i // 2 == j // 2)
    assert note.state == "note"
    assert "0-2, 0-3, 1-2, 1-3" in note.found
