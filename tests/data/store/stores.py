"""Small stores, written from units or built from rows, and the refusal of rows."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sources import rules
from toy import toy_sequences

from uft_ds.data.example import Response, Sequence, Unit
from uft_ds.data.rows.reading import find_data
from uft_ds.data.store.account import Account
from uft_ds.data.store.building import build_store
from uft_ds.data.store.store_files import Place
from uft_ds.data.store.token_store import TokenStore
from uft_ds.data.store.writing import StoreWriter, pack_units
from uft_ds.data.tokens.chat_tokenizer import ChatTokenizer
from uft_ds.errors import UserError

ACCOUNT = Account(9, {"tie": 2}, {"trimmed": 1}, {"tie": [[0, 1], [1, 3]]}, 1, 0)
SCORED = [{"prompt": f"q{i}", "response": "a", "score": i} for i in range(1, 11)]


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


def build(path: Path, chat: ChatTokenizer, *, quarantine: bool = False, workers: int = 1, **changes: Any) -> TokenStore:
    folder = path.parent / f"store-{path.name}-{workers}"
    folder.mkdir()
    build_store(folder, find_data(str(path), None), rules(**changes), chat, quarantine=quarantine, workers=workers)
    return TokenStore(folder, str(path))


def refusal(path: Path, chat: ChatTokenizer, **changes: Any) -> str:
    with pytest.raises(UserError) as caught:
        build(path, chat, **changes)
    return str(caught.value)
