"""The states of a process's random generators as tensors, to be kept with a checkpoint."""

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


def generator_states() -> dict[str, Tensor]:
    """Of torch on the host and on this process's GPU, of numpy and of Python: uint8, by name."""
    numpy_state: Any = np.random.get_state(legacy=False)
    numpy_state["state"]["key"] = numpy_state["state"]["key"].tolist()
    others = json.dumps({"python": random.getstate(), "numpy": numpy_state}).encode()
    states = {TORCH: torch.get_rng_state(), OTHERS: torch.frombuffer(bytearray(others), dtype=torch.uint8)}
    if torch.cuda.is_available():
        states[CUDA] = torch.cuda.get_rng_state()
    return states


def restore_generators(states: Mapping[str, Tensor]) -> None:
    """Put back what is there of them."""
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
