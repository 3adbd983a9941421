"""The states of a process's random number generators as tensors, to be stored in a checkpoint."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

TORCH, CUDA, OTHERS = "rng:torch", "rng:cuda", "rng:python and numpy"
NAMES = (TORCH, CUDA, OTHERS)


def seed_generators(seed: int) -> None:
    """Start all generators of this process from a seed below 2^64: checkpoints of equal runs are then equal files."""
    random.seed(seed)
    np.random.seed([seed % 2**32, seed // 2**32])
    torch.manual_seed(seed)


def generator_states() -> dict[str, Tensor]:
    """The generator states of torch (host and this process's GPU), numpy and Python: uint8 tensors by name."""
    numpy_state: Any = np.random.get_state(legacy=False)
    numpy_state["state"]["key"] = numpy_state["state"]["key"].tolist()
    others = json.dumps({"python": random.getstate(), "numpy": numpy_state}).encode()
    states = {TORCH: torch.get_rng_state(), OTHERS: torch.frombuffer(bytearray(others), dtype=torch.uint8)}
    if torch.cuda.is_available():
        states[CUDA] = torch.cuda.get_rng_state()
    return states


def restore_generators(states: Mapping[str, Tensor]) -> None:
    """Restore the generators whose states are given; the others stay unchanged."""
    if TORCH in states:
        torch.set_rng_state(states[TORCH])
    if CUDA in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states[CUDA])
    if OTHERS in states:
        others = json.loads(bytes(states[OTHERS].tolist()))
        version, internal, gauss = others["python"]
        random.setstate((version, tuple(internal), gauss))
        others["numpy"]["state"]["key"] = np.array(others["numpy"]["state"]["key"], dtype=np.uint32)
        np.random.set_state(others["numpy"])
