"""Small stores, and the units that they are written from."""

from pathlib import Path

import numpy as np
from toy import toy_sequences

from uft_ds.data.example import Response, Sequence, Unit
from uft_ds.data.store.account import Account
from uft_ds.data.store.store_files import Place
from uft_ds.data.store.token_store import TokenStore
from uft_ds.data.store.writing import StoreWriter, pack_units

ACCOUNT = Account(9, {"tie": 2}, {"trimmed": 1}, {"tie": [[0, 1], [1, 3]]}, 1, 0)


def pair(number: int) -> Unit:
    sides = (np.arange(5, dtype=np.int32), np.arange(7, dtype=np.int32) + number)
    return tuple(
        Sequence(tokens, (Response(2, len(tokens), float(1 - i), "pair", "", 0),)) for i, tokens in enumerate(sides)
    )


def write(folder: Path, *chunks: list[tuple[Unit, Place]]) -> TokenStore:
    folder.mkdir(parents=True, exist_ok=True)
    writer = StoreWriter(folder)
    for chunk in chunks:
        writer.add(pack_units(chunk))
    writer.finish(("a.jsonl", "b.jsonl"), ACCOUNT)
    return TokenStore(folder, "label")


def singles(count: int, file: int = 0) -> list[tuple[Unit, Place]]:
    return [((sequence,), Place(file, i + 1, 0)) for i, sequence in enumerate(toy_sequences(count))]
