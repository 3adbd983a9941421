"""Tokenised sequences in flat files that are mapped into memory, so that a million sequences take no RAM.

A store is a folder. Its index is written last, so a folder with an index is complete.

    tokens     one int32 per token
    sequences  the ends of each sequence's tokens and responses, after a first row of zeros
    units      the end of each unit's sequences, and the row that the unit came from, after a first row of zeros
    responses  span, score, kind, and the response key (content hash)
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from uft_ds.data.example import KEY_BYTES, KINDS, Kind, Response, Sequence, Unit, keep_first
from uft_ds.data.rows.places import place_of
from uft_ds.data.score_map import ScoreMap
from uft_ds.errors import UserError
from uft_ds.host.files import sha256, sync, write_atomically
from uft_ds.host.formats import KEY, check_format

INDEX = "index.json"
FORMAT = 1
_DIGESTS = "sha256"
"""Key of the index: the SHA-256, hex, of each file."""
_ZERO_FIRST = ("sequences", "units")
_REMEDY = "delete its folder and start the run again, which prepares the data again"
_SAMPLE_UNITS = 64
DTYPES = {
    "tokens": np.dtype("<i4"),
    "sequences": np.dtype([("tokens", "<i8"), ("responses", "<i8")]),
    "units": np.dtype([("sequences", "<i8"), ("file", "<i4"), ("line", "<i8"), ("item", "<i4")]),
    "responses": np.dtype(
        [("start", "<i4"), ("end", "<i4"), ("score", "<f8"), ("kind", "u1"), ("key", f"V{KEY_BYTES}")]
    ),
}


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


@dataclass(frozen=True)
class Place:
    """The row that a unit came from: index of the file, line (or row, or a negative number of `rows.places`), and the
    item within the row (0: it is alone).
    """

    file: int
    line: int
    item: int


@dataclass(frozen=True)
class ScoresGiven:
    """The lowest and the highest score that the rows give, bad rows included, before any map.

    count, outside: how many scores there are, and how many of them are not on the source's scale. A store that was
        written before they were counted has the count 0, and outside 1 if any is.
    """

    low: float
    high: float
    count: int
    outside: int

    @staticmethod
    def of(scores: list[float], outside: int) -> ScoresGiven:
        return ScoresGiven(min(scores), max(scores), len(scores), outside)

    @staticmethod
    def from_json(values: dict[str, Any]) -> ScoresGiven:
        """The scores of an account in JSON. Older versions also wrote `is_outside`, and the first no counts."""
        given = {**values}
        is_outside = given.pop("is_outside", False)
        return ScoresGiven(**{"count": 0, "outside": int(is_outside)} | given)

    def joined(self, other: ScoresGiven | None) -> ScoresGiven:
        """The same of both."""
        if other is None:
            return self
        return ScoresGiven(
            min(self.low, other.low),
            max(self.high, other.high),
            self.count + other.count,
            self.outside + other.outside,
        )


@dataclass(frozen=True)
class Account:
    """Drop statistics of a source's rows.

    rows: all rows that were read.
    dropped, changed: number of responses by reason.
    places: (file, line) of the first rows for each reason.
    quarantined: number of bad rows.
    skipped: number of rows that `where` does not select.
    unread: number of rows by the name of each column that the format does not read.
    scores: None if no row has a score of its own.
    """

    rows: int
    dropped: dict[str, int]
    changed: dict[str, int]
    places: dict[str, tuple[tuple[int, int], ...]]
    quarantined: int
    skipped: int
    unread: dict[str, int] = field(default_factory=dict)
    scores: ScoresGiven | None = None

    @staticmethod
    def from_json(values: dict[str, Any]) -> Account:
        """What `dataclasses.asdict` and JSON made of an account.

        Raises:
            TypeError: the values are not those of an account.
        """
        scores = values.get("scores")
        return Account(**values | {"scores": None if scores is None else ScoresGiven.from_json(scores)})


class StoreWriter:
    """Appends units to the files of a new store."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files = {name: (folder / f"{name}.bin").open("wb") for name in DTYPES}
        self._digests = {name: hashlib.sha256() for name in DTYPES}
        self._counts = dict.fromkeys(DTYPES, 0)
        # With a first row of zeros, the ends are also the starts, and `np.diff` gives the lengths.
        for name in _ZERO_FIRST:
            self._append(name, np.zeros(1, DTYPES[name]))

    def add(self, columns: dict[str, np.ndarray]) -> None:
        """Append the columns of `pack_units`, whose ends count from their own first token, sequence and response."""
        shifted = {name: array.copy() for name, array in columns.items()}
        # Ends in a store count from the beginning of the store.
        shifted["sequences"]["tokens"] += self._counts["tokens"]
        shifted["sequences"]["responses"] += self._counts["responses"]
        shifted["units"]["sequences"] += self._counts["sequences"]
        for name, array in shifted.items():
            self._append(name, array)
            self._counts[name] += len(array)

    def _append(self, name: str, array: np.ndarray) -> None:
        content = array.tobytes()
        self._files[name].write(content)
        self._digests[name].update(content)

    def finish(self, names: Seq[str], account: Account) -> None:
        """Close the files, then write the index, which makes the store complete."""
        for name, file in self._files.items():
            file.close()
            # Synced before the index is written, so that a crash cannot leave a complete index with truncated files.
            sync(self._folder / f"{name}.bin")
        index = {
            KEY: FORMAT,
            "counts": self._counts,
            _DIGESTS: {name: digest.hexdigest() for name, digest in self._digests.items()},
            "names": list(names),
            "account": asdict(account),
        }
        write_atomically(self._folder / INDEX, json.dumps(index, indent=2) + "\n")

    def close(self) -> None:
        for file in self._files.values():
            file.close()


def pack_units(units: Seq[tuple[Unit, Place]]) -> dict[str, np.ndarray]:
    """Units as the columns of a store; ends count from the first of these units.

    Raises:
        ValueError: a response carries another fact than its score.
    """
    sequences = [sequence for unit, _ in units for sequence in unit]
    others = next((r.other_facts for s in sequences for r in s.responses if r.other_facts), None)
    if others is not None:
        raise ValueError(f"a store holds scores alone: {', '.join(others)} would be lost")
    responses = [
        (r.start, r.end, r.score, KINDS.index(r.kind), key)
        for s in sequences
        for r, key in zip(s.responses, s.response_keys, strict=True)
    ]
    lengths = np.array([[s.num_tokens, len(s.responses)] for s in sequences], dtype=np.int64).reshape(-1, 2)
    sequence_rows = np.zeros(len(sequences), dtype=DTYPES["sequences"])
    sequence_rows["tokens"], sequence_rows["responses"] = lengths.cumsum(axis=0).T
    unit_rows = np.zeros(len(units), dtype=DTYPES["units"])
    unit_rows["sequences"] = np.cumsum([len(unit) for unit, _ in units])
    for column in ("file", "line", "item"):
        unit_rows[column] = [getattr(place, column) for _, place in units]
    tokens = [s.token_ids_T for s in sequences]
    return {
        "tokens": np.concatenate(tokens).astype(DTYPES["tokens"]) if tokens else np.zeros(0, DTYPES["tokens"]),
        "sequences": sequence_rows,
        "units": unit_rows,
        "responses": np.array(responses, dtype=DTYPES["responses"]),
    }


def check_content(folder: Path) -> None:
    """Read all of a store and compare it with what was written; opening a store compares sizes alone.

    A store of an older version, whose index has no hashes, passes.

    Raises:
        UserError: a file's content has changed, or it cannot be read; the message names it.
    """
    expected = _read_index(folder).get(_DIGESTS)
    if expected is None:
        return
    for name in DTYPES:
        path = folder / f"{name}.bin"
        try:
            is_same = isinstance(expected, dict) and sha256(path) == expected.get(name)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); {_REMEDY}") from None
        if not is_same:
            raise UserError(
                f"{path}: its content is not what was written: does the disk fail? Delete {folder}, it is built again"
            )


class TokenStore:
    """A complete store, read through the page cache, which all processes of a machine share."""

    def __init__(self, folder: Path, label: str, names: Seq[str] | None = None) -> None:
        """
        Args:
            label, names: the present names of the source and its files; data may have moved since the store was built.
        Raises:
            UserError: files are missing or truncated, or of another format.
        """
        index = _read_index(folder)
        self.folder, self.label = folder, label
        try:
            self.names: tuple[str, ...] = tuple(names if names is not None else index["names"])
            self.account = Account.from_json(index["account"])
            sizes = {name: int(index["counts"][name]) + (name in _ZERO_FIRST) for name in DTYPES}
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{folder / INDEX}: not an index of a token store ({error!r}); {_REMEDY}") from None
        arrays = {name: _mapped(folder / f"{name}.bin", dtype, sizes[name]) for name, dtype in DTYPES.items()}
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
            Response(int(r["start"]), int(r["end"]), float(r["score"]), _kind(r["kind"]), origin, pair_id) for r in rows
        )
        tokens = self._tokens[self._token_ends_S[index] : self._token_ends_S[index + 1]]
        return Sequence(np.asarray(tokens), responses, tuple(row.tobytes() for row in rows["key"]))


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
        counts = {_kind(code): int(count) for code, count in zip(codes, counts_K, strict=True)}
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
        return {_kind(code) for code in np.unique(self.store.responses["kind"])}


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


def _kind(code: Any) -> Kind:
    return KINDS[int(code)]


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    try:
        index: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found = index.get(KEY)
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); {_REMEDY}") from None
    check_format(path, found, FORMAT, _REMEDY)
    return index


def _mapped(path: Path, dtype: np.dtype, count: int) -> np.ndarray:
    size = path.stat().st_size if path.exists() else -1
    if size != count * dtype.itemsize:
        raise UserError(
            f"{path}: {max(size, 0)} bytes, expected {count * dtype.itemsize}; delete {path.parent}, it is built again"
        )
    # An empty file cannot be mapped.
    return np.memmap(path, dtype=dtype, mode="r") if count else np.zeros(0, dtype)
