"""What a mixture draws from: units by index."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from uft_ds.data.example import Unit


class Pool(Protocol):
    """Units by index, and the facts that planning needs without reading tokens."""

    def __len__(self) -> int:
        """How many units there are."""

    @property
    def responses_U(self) -> np.ndarray:
        """[units], int64: how many responses each has."""

    def unit(self, index: int, pair_id: int = 0) -> Unit:
        """The sequences of one unit; the responses of a pair carry `pair_id`, further pairs the numbers after it."""

    def keys_of(self, index: int) -> tuple[bytes, ...]:
        """The keys of one unit's responses."""

    @property
    def keys_R(self) -> np.ndarray:
        """[responses], 16 bytes each (dtype S16): the keys of all responses, and perhaps of some more."""
