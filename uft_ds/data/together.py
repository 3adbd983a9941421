"""Answers to one prompt are drawn together, so that a step holds all of them and forwards the prompt once.

They are found where they follow each other in the data: the answers of one row, or of rows one after the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from uft_ds.data.example import Sequence, Unit
from uft_ds.data.mixture import Portion
from uft_ds.data.pool import Pool
from uft_ds.data.sources import PreparedSource
from uft_ds.data.store.selection import Selection

MOST_TOGETHER = 16
"""The largest number of responses that are drawn together: all rows of a file may have the same prompt."""


@dataclass(frozen=True)
class TogetherSource:
    """A source as the mixture draws from it, the answers to one prompt as one unit; see `data.mixture.MixedSource`."""

    seed_name: str
    selection: Pool
    portion: Portion

    @classmethod
    def of(cls, source: PreparedSource, examples_per_step: int) -> TogetherSource:
        """examples_per_step: at most a fourth of them are drawn together, which bounds what a step holds too much."""
        firsts_G = _firsts(source.selection, min(MOST_TOGETHER, max(2, examples_per_step // 4)))
        is_grouped = len(firsts_G) < len(source.selection)
        selection = Together(source.selection, firsts_G) if is_grouped else source.selection
        return cls(source.seed_name, selection, source.portion)


def _firsts(selection: Selection, most: int) -> np.ndarray:
    """[groups]: the index of the first unit of each group, in the order of the selection."""
    units_U = selection.units_U
    goes_on_U = np.zeros(len(units_U), dtype=bool)
    goes_on_U[1:] = (np.diff(units_U) == 1) & selection.store.has_prompt_of_unit_before_U[units_U[1:]]
    if not goes_on_U.any():
        return np.arange(len(units_U))
    responses, held = selection.responses_U.tolist(), 0
    firsts = []
    for i, goes_on in enumerate(goes_on_U.tolist()):
        if not goes_on or held + responses[i] > most:
            firsts.append(i)
            held = 0
        held += responses[i]
    return np.array(firsts)


@dataclass(frozen=True)
class Together:
    """A pool whose units are groups of a selection's units, which a step takes as a whole.

    firsts_G: [groups], the index of each group's first unit.
    """

    selection: Selection
    firsts_G: np.ndarray

    def __len__(self) -> int:
        return len(self.firsts_G)

    @property
    def responses_U(self) -> np.ndarray:
        """[groups], int64: how many responses each group has."""
        return np.asarray(np.add.reduceat(self.selection.responses_U, self.firsts_G))

    def unit(self, index: int, pair_id: int = 0) -> Unit:
        """All sequences of a group. Its pairs get ids one after the other, from `pair_id` on."""
        sequences: list[Sequence] = []
        for i in self._members(index):
            one = self.selection.unit(i, pair_id)
            sequences += one
            pair_id += len(one) == 2
        return tuple(sequences)

    def keys_of(self, index: int) -> tuple[bytes, ...]:
        """The keys of one group's responses."""
        return tuple(key for i in self._members(index) for key in self.selection.keys_of(i))

    @property
    def keys_R(self) -> np.ndarray:
        """[responses], 16 bytes each: the keys of all responses, and perhaps of some more."""
        return self.selection.keys_R

    def _members(self, index: int) -> range:
        last = self.firsts_G[index + 1] if index + 1 < len(self.firsts_G) else len(self.selection)
        return range(int(self.firsts_G[index]), int(last))
