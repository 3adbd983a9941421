"""The generators of a process: equal runs store equal states."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from uft_ds.checkpoint.generators import generator_states, restore_generators, seed_generators


@pytest.fixture(autouse=True)
def generators() -> Iterator[None]:
    """Put back what a test changes."""
    before = generator_states()
    yield
    restore_generators(before)


@pytest.mark.parametrize("seed", [0, 42, 2**32 + 42, 2**63 - 1])
def test_a_seed_decides_every_generator(seed: int) -> None:
    """Python's and NumPy's as well as torch's, by all bits of the seed."""
    states = []
    for value in (seed, seed, seed ^ 2**40):
        seed_generators(value)
        states.append({name: bytes(state.tolist()) for name, state in generator_states().items()})
        random.random(), np.random.rand(), torch.rand(1)
    assert states[0] == states[1]
    assert all(states[0][name] != states[2][name] for name in states[0] if name != "rng:cuda")
