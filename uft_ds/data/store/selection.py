"""The units of a store that a run uses, and a small store of the first of them."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from uft_ds.data.example import KEY_BYTES, KINDS, Kind, Sequence, Unit, keep_first
from uft_ds.data.score_map import ScoreMap
from uft_ds.data.store.account import Account
from uft_ds.data.store.store_files import kind_of
from uft_ds.data.store.token_store import TokenStore
from uft_ds.data.store.writing import StoreWriter, pack_units

_SAMPLE_UNITS = 64


@dataclass(frozen=True)
class Selection:
    """The units of a store that a run uses, in the order in which they were drawn.

    last: how many responses of the last unit are kept, so that the count is exact; None: all.
    score_map: applied to the store's scores; None leaves them unchanged.
    """

    store: TokenStore
    units_U: np.ndarray
    last: int | None = None
    score_map: ScoreMap | None = None

    def __len__(self) -> int:
        return len(self.units_U)

    @property
    def responses_U(self) -> np.ndarray:
        counts = self.store.responses_U[self.units_U]
        if self.last is not None and len(counts):
            counts[-1] = self.last
        return counts

    def unit(self, index: int, pair_id: int = 0) -> Unit:
        unit = self.store.unit(int(self.units_U[index]), pair_id)
        if self.last is not None and index == len(self.units_U) - 1:
            unit = (keep_first(unit[0], self.last),)
        return unit if self.score_map is None else tuple(_with_scores(sequence, self.score_map) for sequence in unit)

    def keys_of(self, index: int) -> tuple[bytes, ...]:
        keys = self.store.keys_of(int(self.units_U[index]))
        return keys[: self.last] if self.last is not None and index == len(self) - 1 else keys

    @property
    def keys_R(self) -> np.ndarray:
        return np.ascontiguousarray(self.store.responses["key"][self._is_chosen_R]).view(f"S{KEY_BYTES}")

    @property
    def scores_R(self) -> np.ndarray:
        """[responses]: the scores that the source gave, of all selected responses and perhaps of some more."""
        return np.asarray(self.store.responses["score"][self._is_chosen_R])

    def scores_of(self, kind: Kind) -> np.ndarray:
        """`scores_R` of one kind."""
        return np.asarray(self.scores_R[self._kinds_R == KINDS.index(kind)])

    @property
    def _kinds_R(self) -> np.ndarray:
        return np.asarray(self.store.responses["kind"][self._is_chosen_R])

    @property
    def _is_chosen_R(self) -> np.ndarray:
        is_chosen_U = np.zeros(len(self.store), dtype=bool)
        is_chosen_U[self.units_U] = True
        return np.repeat(is_chosen_U, self.store.responses_U)

    @property
    def num_responses(self) -> int:
        return int(self.responses_U.sum())

    @property
    def responses_of_kind(self) -> dict[Kind, int]:
        """How many of the selected responses each kind has, in the order of KINDS."""
        codes, counts_K = np.unique(self._kinds_R, return_counts=True)
        counts = {kind_of(code): int(count) for code, count in zip(codes, counts_K, strict=True)}
        if self.last is not None and counts:  # the last unit, a conversation, is cut
            last = int(self.units_U[-1])
            kind = self.store.unit(last)[0].responses[0].kind
            counts[kind] -= int(self.store.responses_U[last]) - self.last
        return counts

    @property
    def num_sequences(self) -> int:
        return int(self.store.sequences_U[self.units_U].sum())

    @property
    def num_tokens(self) -> int:
        return int(self.store.tokens_U[self.units_U].sum())

    @property
    def kinds(self) -> set[Kind]:
        """The kinds of all responses in the store, selected or not."""
        return {kind_of(code) for code in np.unique(self.store.responses["kind"])}


def _with_scores(sequence: Sequence, score_map: ScoreMap) -> Sequence:
    responses = tuple(replace(response, score=score_map(response.score)) for response in sequence.responses)
    return Sequence(sequence.token_ids_T, responses, sequence.stored_keys)


def write_sample(folder: Path, selections: Seq[Selection]) -> None:
    """Write a small store with the first 64 units of the first selection that is not empty."""
    chosen = next(selection for selection in selections if len(selection))
    store = chosen.store
    indices = [int(index) for index in chosen.units_U[:_SAMPLE_UNITS]]
    writer = StoreWriter(folder)
    try:
        writer.add(pack_units([(store.unit(index), store.place(index)) for index in indices]))
        writer.finish(store.names, Account(len(indices), {}, {}, {}, 0, 0))
    finally:
        writer.close()
