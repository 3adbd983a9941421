"""Rows to a store: which are taken, and what becomes of each kind."""

from pathlib import Path
from typing import Any

import pytest
from sources import read, write_rows
from stores import build, refusal

from uft_ds.data.store import building
from uft_ds.data.tokens.chat_tokenizer import ChatTokenizer


def test_files_of_one_folder_may_differ_in_kind(tmp_path: Path, chat: ChatTokenizer) -> None:
    """The rule is for each file."""
    write_rows(tmp_path / "data" / "a.jsonl", [{"prompt": "q", "response": "a"}])
    write_rows(tmp_path / "data" / "b.jsonl", [{"prompt": "q", "response": "a", "score": 0.5}])
    store = build(tmp_path / "data", chat)
    assert [store.unit(i)[0].responses[0].kind for i in range(2)] == ["instruction", "score"]


def test_where_selects_rows(tmp_path: Path, chat: ChatTokenizer) -> None:
    """Rows whose columns have other values are counted, and not looked at."""
    rows = [{"prompt": f"q{i}", "completion": "a", "split": ("train", "val")[i % 2]} for i in range(6)]
    rows[1]["completion"] = ""  # bad, but not selected
    path = write_rows(tmp_path / "rows.jsonl", rows)
    store = build(path, chat, format="trl", where=(("split", "train"),))
    assert (len(store), store.account.skipped, store.account.rows) == (3, 3, 6)


PAIRS = [
    {"prompt": "q", "chosen": "good", "rejected": "bad", "score_chosen": 0.9, "score_rejected": 0.2},
    {"prompt": "q", "chosen": "one", "rejected": "other", "score_chosen": 0.5, "score_rejected": 0.5},
]


def test_a_pair_stays_one_unit(tmp_path: Path, chat: ChatTokenizer) -> None:
    """The better side first, kind pair, with the scores of the data; a tie is no preference, dropped and counted."""
    store = build(write_rows(tmp_path / "pairs.jsonl", PAIRS), chat)
    assert len(store) == 1
    assert [(s.responses[0].kind, s.responses[0].score) for s in store.unit(0)] == [("pair", 0.9), ("pair", 0.2)]
    assert store.account.dropped == {"tie": 2}


def test_a_pair_may_become_two_scored_responses(tmp_path: Path, chat: ChatTokenizer) -> None:
    """Split, both sides of both rows are scored responses, the tie's too; without scores in the data, labels."""
    store = build(write_rows(tmp_path / "pairs.jsonl", PAIRS), chat, split_pairs=True)
    found = [(r.kind, r.score) for i in range(len(store)) for s in store.unit(i) for r in s.responses]
    assert found == [("score", 0.9), ("score", 0.2), ("score", 0.5), ("score", 0.5)]
    assert store.account.dropped == {}
    bare = write_rows(tmp_path / "bare.jsonl", [{"prompt": "q", "chosen": "good", "rejected": "bad"}])
    store = build(bare, chat, split_pairs=True)
    found = [(r.kind, r.score) for i in range(len(store)) for s in store.unit(i) for r in s.responses]
    assert found == [("binary", 1.0), ("binary", 0.0)]


def test_items_of_a_row_are_numbered(tmp_path: Path, chat: ChatTokenizer) -> None:
    """Four completions of one row: four units, each with the row's line and its own number."""
    completions = [{"response": f"r{i}", "overall_score": 1 + 3 * i} for i in range(4)]
    path = write_rows(tmp_path / "uf.jsonl", [{"instruction": "q", "completions": completions}])
    store = build(path, chat, format="ultrafeedback")
    assert [read(store, i).origin for i in range(4)] == [f"{path}:1, item {i + 1}" for i in range(4)]
    assert [read(store, i).score for i in range(4)] == [0.0, 1 / 3, 2 / 3, 1.0]


def test_columns_are_renamed_and_the_others_counted(tmp_path: Path, chat: ChatTokenizer) -> None:
    """`where` takes the names in the data; what the format does not read is counted by row, and none is lost."""
    rows = [{"question": f"q{i}", "answer": "a", "system": "s", "id": i, "keep": i != 2} for i in range(5)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    columns = (("completion", "answer"), ("prompt", "question"), ("system", None))
    store = build(path, chat, format="trl", columns=columns, where=(("keep", True),))
    assert len(store) == 4
    assert store.account.unread == {"id": 4, "keep": 4}


MIXED: list[dict[str, Any]] = [
    {"prompt": "q", "response": "a"},
    {"prompt": "q", "response": "b", "score": 0.25},
    {"prompt": "q", "response": "c", "label": False},
    {"prompt": "q", "chosen": "d", "rejected": "e"},
    {"prompt": "q", "chosen": "f", "rejected": "g", "score_chosen": 0.75, "score_rejected": 0.5},
]


@pytest.mark.usefixtures("forked_workers")
@pytest.mark.parametrize("workers", [1, 2])
def test_kinds_may_be_mixed_where_the_source_says_so(
    tmp_path: Path, chat: ChatTokenizer, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each row's own kind counts; without the key the refusal names it."""
    monkeypatch.setattr(building, "_CHUNK_ROWS", 2)
    path = write_rows(tmp_path / "mixed.jsonl", MIXED)
    store = build(path, chat, mixed_kinds=True, workers=workers)
    found = [(r.kind, r.score) for i in range(len(store)) for s in store.unit(i) for r in s.responses]
    assert found == [
        ("instruction", 1.0),
        ("score", 0.25),
        ("binary", 0.0),
        ("pair", 1.0),
        ("pair", 0.0),
        ("pair", 0.75),
        ("pair", 0.5),
    ]
    store.folder.rename(tmp_path / "mixed")
    message = refusal(path, chat, workers=workers)
    assert message.startswith(f"{path}:2: a row of kind 'score'")
    assert "or set this source's mixed_kinds: true if that is meant" in message
    assert f"\n4 of 5 rows of {path} are bad" in message
