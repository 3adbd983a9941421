"""Write a store: units as columns, appended to its files, and the index at the end."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence as Seq
from dataclasses import asdict
from pathlib import Path

import numpy as np

from uft_ds.data.example import KINDS, Unit
from uft_ds.data.store.account import Account
from uft_ds.data.store.store_files import DIGESTS, DTYPES, FORMAT, INDEX, ZERO_FIRST, Place
from uft_ds.host.files import sync, write_atomically
from uft_ds.host.formats import KEY


class StoreWriter:
    """Appends units to the files of a new store."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files = {name: (folder / f"{name}.bin").open("wb") for name in DTYPES}
        self._digests = {name: hashlib.sha256() for name in DTYPES}
        self._counts = dict.fromkeys(DTYPES, 0)
        # With a first row of zeros, the ends are also the starts, and `np.diff` gives the lengths.
        for name in ZERO_FIRST:
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
            DIGESTS: {name: digest.hexdigest() for name, digest in self._digests.items()},
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
