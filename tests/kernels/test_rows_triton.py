"""The Triton sweeps without a GPU: right in the interpreter, and compiled for GPUs that are not here.

Both, because each is blind where the other sees: the interpreter accepts kernels that do not compile, and shows
neither races nor registers. Each in a process of its own, because the interpreter is chosen when a kernel is defined.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import needs
import pytest
import torch
from suites import long_but

from uft_ds.kernels import rows_torch, sweeps

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes a block may have: CUDA C++ programming guide, compute capabilities."""


@pytest.fixture(scope="module")
def triton() -> None:
    """The subprocesses of this file import it; here it stays unimported."""
    needs.installed("triton", f"{needs.DEV}, where it is published for the platform")


def run(command: list[str], cache: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    folder = Path(__file__).parent
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=inherited | environment | {"TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("marked", long_but(["not long"], ["not long", "long"]))
def test_in_the_interpreter(tmp_path: Path, marked: str) -> None:
    """All of `interpreted_rows.py` that has the mark passes, and nothing of it is skipped."""
    command = ["-m", "pytest", "-v", "-p", "no:cacheprovider", "-m", marked, "interpreted_rows.py"]
    result = run(command, tmp_path, TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-1000:]
    assert " passed" in result.stdout
    assert "skipped" not in result.stdout


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("target", long_but([90], SHARED_MEMORY))
def test_compiles_ahead_of_time(tmp_path: Path, target: int) -> None:
    """For weights of all types, with and without bias, cap and entropy: nothing spilled, shared memory that the target
    has, the tile read before it is overwritten, and loads of four floats where the vocabulary is a multiple of 16."""
    result = run(["compiled_rows.py", str(target)], tmp_path)
    assert result.returncode == 0, result.stderr[-5000:]
    compiled: list[dict[str, Any]] = json.loads(result.stdout)
    assert {build["target"] for build in compiled} == {target}
    assert len(compiled) == 14
    for build in compiled:
        assert build["spilled_bytes"] == 0, build
        assert build["registers"] <= 80, build  # 256 threads: three blocks to a multiprocessor of 65536 registers
        assert build["shared_bytes"] <= SHARED_MEMORY[target], build
        if build["variant"]["width"] > 4096:
            assert build["loops"] == (2 if build["variant"]["kernel"] == "absorb" else 1), build
            assert build["fenced_loops"] == 1, build
        if build["variant"]["width"] % 16 == 0:
            assert build["vector_loads"] >= 4 * build["loops"], build
            assert build["scalar_loads"] == 0, build


def test_without_triton_plain_torch_is_taken_and_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Once, not at every call."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    sweeps._sweeps.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert sweeps.sweeps_for(torch.device("cuda"), torch.float32) is rows_torch
    assert [record.message for record in caplog.records] == [
        "Triton is not installed: rows of logits are swept by plain torch, in about six passes instead of two"
    ]
    sweeps._sweeps.cache_clear()


def test_processors_take_plain_torch() -> None:
    """Triton has no back end for them."""
    assert sweeps.sweeps_for(torch.device("cpu"), torch.float32) is rows_torch
