"""Check torch's build against the driver, and each GPU's memory, errors, compute mode and peer access."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from uft_ds.doctor.finding import Finding
from uft_ds.doctor.tools import output_of

Ask = Callable[[Sequence[str]], str | None]
_SMI = "nvidia-smi"
_FIELDS = "index,gpu_uuid,name,memory.total,memory.used,ecc.errors.uncorrected.volatile.total,compute_mode"
_TAKEN_MIB = 1024
"""An idle driver takes less memory than this."""


@dataclass(frozen=True)
class TorchBuild:
    """The installed torch. cuda: the CUDA version it is built for, None for a CPU build. devices: visible GPUs."""

    version: str
    cuda: str | None
    devices: int

    @classmethod
    def here(cls) -> TorchBuild:
        return cls(torch.__version__, torch.version.cuda, torch.cuda.device_count())


def check_torch(build: TorchBuild, ask: Ask = output_of) -> Finding:
    """Compare torch's build with the driver. A machine without a driver has no GPU, which is not a problem."""
    summary = ask([_SMI])
    said = f"torch {build.version}"
    if summary is None:
        if build.devices:
            return Finding("torch", "ok", f"{said}, {build.devices} GPUs, no {_SMI}")
        return Finding("torch", "ok", f"{said}; no GPU here: two CPU processes")
    driver = re.search(r"CUDA Version:\s*([\d.]+)", summary)
    serves = f"the driver serves CUDA {driver[1]}" if driver else "a driver is there"
    if build.cuda is None:
        remedy = f"pip install --force-reinstall 'torch=={build.version.partition('+')[0]}' in its CUDA build"
        return Finding("torch", "problem", f"{said} is a CPU build, but {serves}", remedy)
    if driver and _numbers(driver[1])[0] < _numbers(build.cuda)[0]:
        remedy = f"update the driver, or pip install torch's build for CUDA {driver[1]} or older"
        return Finding("torch", "problem", f"{said} is built for CUDA {build.cuda}, but {serves}", remedy)
    if not build.devices:
        remedy = "see CUDA_VISIBLE_DEVICES, the container's --gpus, and dmesg"
        return Finding("torch", "problem", f"{said} sees no GPU, but {serves}", remedy)
    return Finding("torch", "ok", f"{said} for CUDA {build.cuda}, {serves}, {build.devices} GPUs")


def check_gpus(ask: Ask = output_of) -> list[Finding]:
    """Check each GPU: memory in use, uncorrected errors, and a compute mode that admits processes."""
    rows = ask([_SMI, f"--query-gpu={_FIELDS}", "--format=csv,noheader,nounits"])
    if not rows:
        return []
    users = ask([_SMI, "--query-compute-apps=gpu_uuid,pid", "--format=csv,noheader,nounits"]) or ""
    apps = [tuple(part.strip() for part in line.split(",")) for line in users.splitlines()]
    findings = []
    for row in filter(str.strip, rows.splitlines()):
        index, uuid, rest = (part.strip() for part in row.split(",", 2))
        name, *state = (part.strip() for part in rest.rsplit(",", 4))
        findings.append(_state_of(index, name, *state, pids=[app[1] for app in apps if app[0] == uuid]))
    return findings


def check_peers(
    devices: int, can_reach: Callable[[int, int], bool] = torch.cuda.can_device_access_peer
) -> list[Finding]:
    """Check that GPUs can access each other's memory; otherwise gathers go through host memory."""
    if devices < 2:
        return []
    apart = [f"{i}-{j}" for i in range(devices) for j in range(i + 1, devices) if not can_reach(i, j)]
    if apart:
        found = f"GPUs {', '.join(apart[:8])} cannot reach each other: gathers go through host memory"
        return [Finding("GPU links", "note", found, "see nvidia-smi topo -m; on PCIe, IOMMU and ACS settings")]
    return [Finding("GPU links", "ok", "every GPU reaches every other")]


def _state_of(index: str, name: str, total: str, used: str, errors: str, mode: str, *, pids: list[str]) -> Finding:
    label, memory = f"GPU {index}", f"{name}, {_gib(used)} of {_gib(total)} GiB taken"
    if errors.isdigit() and int(errors):
        found = f"{memory}; {errors} uncorrected memory errors since the driver started"
        return Finding(label, "problem", found, "do not trust results of it: reset it, or have the node drained")
    if mode == "Prohibited":
        return Finding(label, "problem", f"{memory}; compute mode {mode}", f"nvidia-smi -i {index} -c DEFAULT, as root")
    if used.isdigit() and int(used) > _TAKEN_MIB:
        remedy = "choose others by CUDA_VISIBLE_DEVICES, or end what runs there"
        return Finding(label, "note", f"{memory} (processes: {', '.join(pids) or 'not visible from here'})", remedy)
    return Finding(label, "ok", memory)


def _gib(mebibytes: str) -> str:
    return f"{int(mebibytes) / 1024:.1f}" if mebibytes.isdigit() else "?"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))
