"""Small data files and rows, and what is made of them."""

import json
from pathlib import Path
from typing import Any

from uft_ds.data.example import Example, Response
from uft_ds.data.store.building import RowRules
from uft_ds.data.store.token_store import TokenStore

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "q1"},
    {"role": "assistant", "content": "a1"},
    {"role": "user", "content": "q2"},
]


def turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def said(example: Example) -> list[tuple[str, str, float | None]]:
    return [(m.role, m.content, m.score) for m in example.messages]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rules(**changes: Any) -> RowRules:
    """Rows of our own format, whole conversations, at most 512 tokens."""
    defaults = {"format": "jsonl", "score": None, "max_length": 512, "merge": True, "trim_prompt": False}
    return RowRules(**defaults | changes)


def read(store: TokenStore, index: int) -> Response:
    """The first response of a unit."""
    return store.unit(index)[0].responses[0]
