"""The files of a store of tokenised sequences, which are mapped into memory: a million sequences take no RAM.

A store is a folder. Its index is written last, so a folder with an index is complete.

    tokens     one int32 per token
    sequences  the ends of each sequence's tokens and responses, after a first row of zeros
    units      the end of each unit's sequences, and the row that the unit came from, after a first row of zeros
    responses  span, score, kind, and the response key (content hash)
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from uft_ds.data.example import KEY_BYTES, KINDS, Kind
from uft_ds.errors import UserError
from uft_ds.host.files import sha256
from uft_ds.host.formats import KEY, check_format

INDEX = "index.json"
FORMAT = 1
DIGESTS = "sha256"
"""Key of the index: the SHA-256, hex, of each file."""
ZERO_FIRST = ("sequences", "units")
REMEDY = "delete its folder and start the run again, which prepares the data again"
DTYPES = {
    "tokens": np.dtype("<i4"),
    "sequences": np.dtype([("tokens", "<i8"), ("responses", "<i8")]),
    "units": np.dtype([("sequences", "<i8"), ("file", "<i4"), ("line", "<i8"), ("item", "<i4")]),
    "responses": np.dtype(
        [("start", "<i4"), ("end", "<i4"), ("score", "<f8"), ("kind", "u1"), ("key", f"V{KEY_BYTES}")]
    ),
}


@dataclass(frozen=True)
class Place:
    """The row that a unit came from: index of the file, line (or row, or a negative number of `rows.places`), and the
    item within the row (0: it is alone).
    """

    file: int
    line: int
    item: int


def kind_of(code: Any) -> Kind:
    """The kind that a row of `responses` holds as its number."""
    return KINDS[int(code)]


def read_index(folder: Path) -> dict[str, Any]:
    """The content of a store's index.

    Raises:
        UserError: it cannot be read, or has another format.
    """
    path = folder / INDEX
    try:
        index: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found = index.get(KEY)
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); {REMEDY}") from None
    check_format(path, found, FORMAT, REMEDY)
    return index


def mapped(path: Path, dtype: np.dtype, count: int) -> np.ndarray:
    """A file of `count` rows as an array.

    Raises:
        UserError: it is missing, or has another size.
    """
    size = path.stat().st_size if path.exists() else -1
    if size != count * dtype.itemsize:
        raise UserError(
            f"{path}: {max(size, 0)} bytes, expected {count * dtype.itemsize}; delete {path.parent}, it is built again"
        )
    # An empty file cannot be mapped.
    return np.memmap(path, dtype=dtype, mode="r") if count else np.zeros(0, dtype)


def check_content(folder: Path) -> None:
    """Read all of a store and compare it with what was written; opening a store compares sizes alone.

    A store of an older version, whose index has no hashes, passes.

    Raises:
        UserError: a file's content has changed, or it cannot be read; the message names it.
    """
    expected = read_index(folder).get(DIGESTS)
    if expected is None:
        return
    for name in DTYPES:
        path = folder / f"{name}.bin"
        try:
            is_same = isinstance(expected, dict) and sha256(path) == expected.get(name)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); {REMEDY}") from None
        if not is_same:
            raise UserError(
                f"{path}: its content is not what was written: does the disk fail? Delete {folder}, it is built again"
            )
