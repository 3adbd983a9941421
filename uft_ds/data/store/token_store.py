"""A complete store: tokenised sequences by index, and the facts that planning needs without reading tokens."""

from __future__ import annotations

import copy
from collections.abc import Sequence as Seq
from functools import cached_property
from pathlib import Path

import numpy as np

from uft_ds.data.example import Response, Sequence, Unit
from uft_ds.data.rows.places import place_of
from uft_ds.data.store.account import Account
from uft_ds.data.store.store_files import DTYPES, INDEX, REMEDY, ZERO_FIRST, Place, kind_of, mapped, read_index
from uft_ds.errors import UserError


class TokenStore:
    """A complete store, read through the page cache, which all processes of a machine share."""

    def __init__(self, folder: Path, label: str, names: Seq[str] | None = None) -> None:
        """
        Args:
            label, names: the present names of the source and its files; data may have moved since the store was built.
        Raises:
            UserError: files are missing or truncated, or of another format.
        """
        index = read_index(folder)
        self.folder, self.label = folder, label
        try:
            self.names: tuple[str, ...] = tuple(names if names is not None else index["names"])
            self.account = Account.from_json(index["account"])
            sizes = {name: int(index["counts"][name]) + (name in ZERO_FIRST) for name in DTYPES}
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{folder / INDEX}: not an index of a token store ({error!r}); {REMEDY}") from None
        arrays = {name: mapped(folder / f"{name}.bin", dtype, sizes[name]) for name, dtype in DTYPES.items()}
        self._tokens, self.responses = arrays["tokens"], arrays["responses"]
        self._token_ends_S = arrays["sequences"]["tokens"]
        self._response_ends_S = arrays["sequences"]["responses"]
        self._sequence_ends_U = arrays["units"]["sequences"]
        self._units = arrays["units"][1:]

    def renamed(self, label: str, names: tuple[str, ...]) -> TokenStore:
        """The same store by other names of the source and its files."""
        other = copy.copy(self)
        other.label, other.names = label, names
        return other

    def __len__(self) -> int:
        return len(self._units)

    @property
    def responses_U(self) -> np.ndarray:
        """[units], int64: how many responses each unit has."""
        return np.diff(self._response_ends_S[self._sequence_ends_U])

    @property
    def tokens_U(self) -> np.ndarray:
        """[units], int64: how many tokens each unit has."""
        return np.diff(self._token_ends_S[self._sequence_ends_U])

    @property
    def sequences_U(self) -> np.ndarray:
        """[units], int64: how many sequences each unit has: 1, or 2 for a pair."""
        return np.diff(self._sequence_ends_U)

    @property
    def token_ids(self) -> np.ndarray:
        """[tokens], int32: of all sequences, one after the other."""
        return np.asarray(self._tokens)

    @property
    def rows_U(self) -> np.ndarray:
        """[units], int64: the row that each unit came from, counted among the rows that gave a unit."""
        changes_U = np.zeros(len(self), dtype=np.int64)
        for column in ("file", "line"):
            changes_U[1:] |= np.diff(self._units[column]) != 0
        return changes_U.cumsum()

    @cached_property
    def has_prompt_of_unit_before_U(self) -> np.ndarray:
        """[units], bool: whether the tokens before its first response are those of the unit before it.

        Of a pair the chosen side counts.
        """
        first_S = self._sequence_ends_U[:-1]
        begins_U, first_R = self._token_ends_S[first_S], self._response_ends_S[first_S]
        # A unit without a response would read the next one's start; `pack_units` is given none.
        starts_U = self.responses["start"][first_R]
        same_U = np.zeros(len(self), dtype=bool)
        same_U[1:] = starts_U[1:] == starts_U[:-1]
        for unit in np.flatnonzero(same_U).tolist():
            before, begin, length = int(begins_U[unit - 1]), int(begins_U[unit]), int(starts_U[unit])
            same_U[unit] = np.array_equal(self._tokens[before : before + length], self._tokens[begin : begin + length])
        return same_U

    def is_pair(self, index: int) -> bool:
        """Whether a unit is a pair."""
        return bool(self._sequence_ends_U[index + 1] - self._sequence_ends_U[index] == 2)

    def place(self, index: int) -> Place:
        """The row that a unit came from."""
        row = self._units[index]
        return Place(int(row["file"]), int(row["line"]), int(row["item"]))

    def places_of(self, reason: str) -> tuple[str, ...]:
        """The places of the first rows with a response dropped or changed for this reason."""
        return tuple(place_of(self.names[file], line) for file, line in self.account.places.get(reason, ()))

    def origin(self, index: int) -> str:
        """The place that a unit came from, for messages."""
        place = self.place(index)
        return place_of(self.names[place.file], place.line) + (f", item {place.item}" if place.item else "")

    def unit(self, index: int, pair_id: int = 0) -> Unit:
        first, last = self._sequence_ends_U[index], self._sequence_ends_U[index + 1]
        sides = (" (chosen)", " (rejected)") if last - first == 2 else ("",)
        return tuple(
            self._sequence(int(s), self.origin(index) + side, pair_id if len(sides) == 2 else None)
            for s, side in zip(range(first, last), sides, strict=True)
        )

    def keys_of(self, index: int) -> tuple[bytes, ...]:
        """The keys of one unit's responses."""
        first, last = self._sequence_ends_U[index], self._sequence_ends_U[index + 1]
        rows = self.responses["key"][self._response_ends_S[first] : self._response_ends_S[last]]
        return tuple(key.tobytes() for key in rows)

    def _sequence(self, index: int, origin: str, pair_id: int | None) -> Sequence:
        rows = self.responses[self._response_ends_S[index] : self._response_ends_S[index + 1]]
        responses = tuple(
            Response(int(r["start"]), int(r["end"]), float(r["score"]), kind_of(r["kind"]), origin, pair_id)
            for r in rows
        )
        tokens = self._tokens[self._token_ends_S[index] : self._token_ends_S[index + 1]]
        return Sequence(np.asarray(tokens), responses, tuple(row.tobytes() for row in rows["key"]))
