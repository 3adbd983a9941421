"""What is here: the GPU, the driver, the packages, bfloat16, memory, and the speed of a plain matrix product."""

from __future__ import annotations

import importlib.util
import platform
import re
import subprocess
import time
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from packaging.requirements import Requirement

from gpu_check.report import Place, Report, wait
from uft_ds.host.gpus import peak_flops

PROJECT = Path(__file__).parents[2] / "pyproject.toml"
MATRIX = 8192
NOT_NEEDED = frozenset({"tensorboard", "matplotlib", "gguf", "sentencepiece", "protobuf", "datasets", "pyarrow"})
"""Of the project's packages, those without which all stages run: for pictures, other data, other models."""


def run(report: Report, place: Place) -> None:
    for name in ("torch", "triton", "deepspeed", "transformers", "peft", "trl", "flash-attn", "liger-kernel", "numpy"):
        report.fact(name, found_version(name))
    report.fact("python", platform.python_version())
    for problem in wrong_packages():
        report.demand(False, problem)
    if place.device.type == "cuda":
        _gpu(report)
    else:
        report.demand(place.toy, "torch sees no GPU, and --cpu was not given")
    report.fact("attention of packed rows", attention_path(place.device))
    seconds = _matmul_seconds(place, place.size(MATRIX, 256))
    rate = 2.0 * place.size(MATRIX, 256) ** 3 / seconds
    report.fact("bf16 matmul TFLOP/s", rate / 1e12)
    peak = peak_flops(torch.cuda.get_device_name()) if place.device.type == "cuda" else None
    report.fact("bf16 matmul, share of the data sheet", None if peak is None else rate / peak)


def _gpu(report: Report) -> None:
    card = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info()
    report.fact("GPU", card.name)
    report.fact("GPUs", torch.cuda.device_count())
    report.fact("known to uft plan", peak_flops(card.name) is not None)
    report.fact("compute capability", ".".join(map(str, torch.cuda.get_device_capability())))
    report.fact("memory GiB", total / 2**30)
    report.fact("memory free GiB", free / 2**30)
    report.fact("CUDA of torch", torch.version.cuda)
    report.fact("driver", _driver())
    has_bf16 = torch.cuda.is_bf16_supported()
    report.fact("bfloat16", has_bf16)
    report.demand(has_bf16, "this GPU has no bfloat16, the type of the recipes")
    report.demand(importlib.util.find_spec("triton") is not None, "no Triton: logits are swept by plain torch")


def _driver() -> str:
    try:
        asked = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=20, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unknown ({type(error).__name__})"
    return asked.stdout.strip() or "unknown"


def found_version(name: str) -> str:
    """The installed version; `-` if there is none."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "-"


def wrong_packages(requirements: list[str] | None = None) -> list[str]:
    """A sentence about each package of the project that is missing or of another version than it allows.

    Args:
        requirements: by default those of pyproject.toml that a stage needs.
    """
    if requirements is None:
        requirements = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]["dependencies"]
    problems = []
    for requirement in map(Requirement, requirements):
        if requirement.name in NOT_NEEDED:
            continue
        found = found_version(requirement.name)
        if found == "-":
            problems.append(f"{requirement.name} is not installed, {requirement} is needed")
        elif not requirement.specifier.contains(re.sub(r"\+.*", "", found), prereleases=True):
            problems.append(f"{requirement.name} {found} is installed, {requirement} is needed")
    return problems


def attention_path(device: torch.device) -> str:
    """How `model.attention: packed` computes a half-precision row here."""
    from uft_ds.streams.packed_attention import _runs_varlen

    query = torch.zeros(1, 1, 16, 64, dtype=torch.bfloat16, device=device)
    if _runs_varlen(query):
        return "varlen: all segments at once"
    return f"sdpa, one segment after the other (varlen needs torch 2.13 and an Ampere GPU; torch {torch.__version__})"


def _matmul_seconds(place: Place, size: int) -> float:
    left, right = (torch.randn(size, size, device=place.device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        left @ right
    wait(place)
    rounds = place.size(20, 2)
    started = time.perf_counter()
    for _ in range(rounds):
        left @ right
    wait(place)
    return (time.perf_counter() - started) / rounds
