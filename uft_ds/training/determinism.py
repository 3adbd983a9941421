"""The same numbers from the same start, run after run: settings of the process, before its first forward."""

from __future__ import annotations

import os

import torch
import torch.utils.deterministic


def make_deterministic() -> None:
    """Let torch take deterministic kernels only, and refuse an operation that has none.

    torch would also fill every tensor that it allocates with NaN, to show reads of memory that nothing was written to.
    Under ZeRO-3 this writes each layer once more whenever it is gathered, so it is off: `benchmarks/determinism.py`.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("FLASH_ATTENTION_DETERMINISTIC", "1")  # read by transformers
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
