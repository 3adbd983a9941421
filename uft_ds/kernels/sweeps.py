"""Which implementation sweeps over rows of logits: Triton on GPUs, plain torch elsewhere."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from types import ModuleType

import torch

logger = logging.getLogger(__name__)


def sweeps_for(device: torch.device, dtype: torch.dtype) -> ModuleType:
    """The implementation: `rows_triton` on GPUs and under Triton's interpreter, else `rows_torch`.

    `rows_torch` also serves float64 and machines without Triton.
    """
    on_gpu = device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    return _sweeps(on_gpu and dtype == torch.float32)


@functools.cache
def _sweeps(for_gpu: bool) -> ModuleType:
    if for_gpu:
        if importlib.util.find_spec("triton") is not None:
            from uft_ds.kernels import rows_triton

            return rows_triton
        logger.warning(
            "Triton is not installed: rows of logits are swept by plain torch, in about six passes instead of two"
        )
    from uft_ds.kernels import rows_torch

    return rows_torch
