"""Pools of toy sequences, and plans over them."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from uft_ds.data.example import KEY_BYTES, Sequence, Unit
from uft_ds.data.mixture import ONE_PASS, Portion, Steps, plan_steps
from uft_ds.data.pool import Pool


@dataclass(frozen=True)
class Held:
    """A pool of sequences in memory; two that follow each other with one pair_id are a pair."""

    sequences: tuple[Sequence, ...]

    @cached_property
    def units(self) -> list[Unit]:
        found: list[Unit] = []
        for sequence in self.sequences:
            if found and sequence.pair_id is not None and found[-1][0].pair_id == sequence.pair_id:
                found[-1] = (*found[-1], sequence)
            else:
                found.append((sequence,))
        return found

    def __len__(self) -> int:
        return len(self.units)

    @cached_property
    def responses_U(self) -> np.ndarray:
        return np.array([sum(len(s.responses) for s in unit) for unit in self.units], dtype=np.int64)

    def unit(self, index: int, pair_id: int = 0) -> Unit:
        unit = self.units[index]
        if len(unit) == 1:
            return unit
        return tuple(replace(s, responses=(replace(s.responses[0], pair_id=pair_id),)) for s in unit)

    def keys_of(self, index: int) -> tuple[bytes, ...]:
        return tuple(key for sequence in self.units[index] for key in sequence.response_keys)

    @cached_property
    def keys_R(self) -> np.ndarray:
        keys = [key for sequence in self.sequences for key in sequence.response_keys]
        return np.array(keys, dtype=f"V{KEY_BYTES}").view(f"S{KEY_BYTES}")


@dataclass(frozen=True)
class Mixed:
    """What the mixture takes of a source, without any data beside its units."""

    seed_name: str
    selection: Pool
    portion: Portion = ONE_PASS


def plan(*sources: tuple[Sequence, ...], **changes: Any) -> Steps:
    """Steps of eight responses over whole sources, one epoch."""
    mixed = [Mixed(f"source {i}", Held(source)) for i, source in enumerate(sources)]
    return plan_steps(mixed, **{"seed": 0, "examples_per_step": 8, "epochs": 1, "steps": None} | changes)
