"""Settings that make runs from the same start give the same numbers; they must be made before the first forward."""

from __future__ import annotations

import os

import torch
import torch.utils.deterministic


def make_deterministic() -> None:
    """Make torch use only deterministic kernels and raise an error for an operation that has none.

    In this mode torch also fills each newly allocated tensor with NaN, to reveal reads of uninitialised memory. Under
    ZeRO-3 this writes each layer once more whenever it is gathered, so it is turned off (`benchmarks/determinism.py`).
    """
    # Without it torch refuses matmuls on a GPU in deterministic mode.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("FLASH_ATTENTION_DETERMINISTIC", "1")  # read by transformers
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
