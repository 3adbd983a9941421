"""Training's micro-step on `cuda:0` without a GPU: tensors that have a device, a type and a shape, but no values.

Autograd's engine of a CPU build of torch refuses such tensors, so a small library gives it what it asks for. It is
loaded before torch, and the engine counts its devices once: both need a process of their own.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import needs
import pytest
import torch
from suites import long_but

from uft_ds.host.files import user_cache

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def library() -> Path:
    """`fake_cuda.cpp` for the installed torch, as a shared library: built once, into the user's cache."""
    needs.program("g++", "a C++ compiler builds the stand-in for CUDA's device guard")
    if torch.version.cuda is not None:
        needs.missing("build of torch for CPUs", "one with CUDA has a device guard of its own")
    torch_folder, source = Path(torch.__file__).parent, HERE / "fake_cuda.cpp"
    words = f"{torch_folder} {torch.__version__} {source.read_text(encoding='utf-8')}"
    folder = user_cache() / "fake_cuda"
    built = folder / f"{hashlib.sha256(words.encode()).hexdigest()[:16]}.so"
    if built.exists():
        return built
    folder.mkdir(parents=True, exist_ok=True)
    made = folder / f"{built.name}.{os.getpid()}"
    sources = ["-shared", "-fPIC", "-std=c++20", f"-I{torch_folder / 'include'}", str(source)]
    libraries = [f"-L{torch_folder / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch_folder / 'lib'}"]
    result = subprocess.run(
        ["g++", *sources, "-o", str(made), *libraries], capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    made.replace(built)
    return built


@pytest.mark.parametrize("marked", long_but(["not long"], ["not long", "long"]))
def test_a_micro_step_on_fake_cuda(library: Path, tmp_path: Path, marked: str) -> None:
    """All of `steps_on_fake_cuda.py` that has the mark passes, and nothing of it is skipped."""
    needs.installed("triton", f"{needs.DEV}, where it is published for the platform")
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-m", marked, "steps_on_fake_cuda.py"]
    environment = os.environ | {"LD_PRELOAD": str(library), "TRITON_CACHE_DIR": str(tmp_path)}
    result = subprocess.run(
        command, cwd=HERE, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
    assert "skipped" not in result.stdout
