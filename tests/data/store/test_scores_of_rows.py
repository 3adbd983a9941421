"""Scores of the rows, on the scale that the source gives."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sources import write_rows
from stores import SCORED, build, refusal

from uft_ds.data.formats.table import FORMATS
from uft_ds.data.store.account import ScoresGiven
from uft_ds.data.tokens.chat_tokenizer import ChatTokenizer


def test_a_score_range_maps_scores_linearly(tmp_path: Path, chat: ChatTokenizer) -> None:
    """1 to 10: 1 is 0, 10 is 1, 4 is a third; the ends exactly. The lowest and the highest score found are recorded."""
    path = write_rows(tmp_path / "rows.jsonl", SCORED)
    store = build(path, chat, score_range=(1.0, 10.0))
    assert store.responses["score"].tolist() == pytest.approx([(i - 1) / 9 for i in range(1, 11)], abs=1e-15)
    assert (store.responses["score"][0], store.responses["score"][-1]) == (0.0, 1.0)
    assert store.account.scores == ScoresGiven(1.0, 10.0, count=10, outside=0)


def test_only_scores_that_are_read_are_recorded(tmp_path: Path, chat: ChatTokenizer) -> None:
    """Of a row with argilla's ratings and other scores beside them, the ratings; the others are not read."""
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "metadata": {"score_chosen": 77, "score_rejected": 66}}
    row |= {"score_chosen": 9, "score_rejected": 7}
    path = write_rows(tmp_path / "scores.jsonl", [row])
    assert build(path, chat, format="ultrafeedback_binarized").account.scores == ScoresGiven(
        7.0, 9.0, count=2, outside=0
    )
    path = write_rows(tmp_path / "ratings.jsonl", [row | {"chosen-rating": 4.5, "rejected-rating": 2}])
    store = build(path, chat, format="ultrafeedback_binarized", score_range=(1.0, 5.0))
    assert store.account.scores == ScoresGiven(2.0, 4.5, count=2, outside=0)


def test_every_format_with_scores_takes_a_range(tmp_path: Path, chat: ChatTokenizer) -> None:
    """It replaces the format's own scale; other formats refuse it, because their scale is part of what they are."""
    ultra = [{"instruction": "q", "completions": [{"response": f"a{s}", "overall_score": s} for s in (0, 0, 3, 4)]}]
    path = write_rows(tmp_path / "ultra.jsonl", ultra)
    assert refusal(path, chat, format="ultrafeedback").endswith("score_range: [0, 4]")
    (tmp_path / "store-ultra.jsonl-1").rename(tmp_path / "first")
    store = build(path, chat, format="ultrafeedback", score_range=(0.0, 4.0))
    assert store.responses["score"].tolist() == [0.0, 0.0, 0.75, 1.0]
    for names in (("score_chosen", "score_rejected"), ("chosen-rating", "rejected-rating")):
        row = {"prompt": "q", "chosen": "a", "rejected": "b"} | dict(zip(names, (90, 20), strict=True))
        path = write_rows(tmp_path / f"{names[0]}.jsonl", [row])
        store = build(path, chat, format="ultrafeedback_binarized", score_range=(0.0, 100.0))
        assert store.responses["score"].tolist() == [0.9, 0.2]
    table = tmp_path / "rows.csv"
    table.write_text("prompt,response,stars\nq,a,1\nq,b,4\n", encoding="utf-8")
    store = build(table, chat, score_range=(1.0, 5.0), columns=(("score", "stars"),))
    assert store.responses["score"].tolist() == [0.0, 0.75]
    pq.write_table(pa.table({"prompt": ["q"], "response": ["a"], "score": [2.5]}), tmp_path / "rows.parquet")
    assert build(tmp_path / "rows.parquet", chat, score_range=(0.0, 5.0)).responses["score"].tolist() == [0.5]
    for name in sorted(FORMATS.keys() - {"jsonl", "ultrafeedback", "ultrafeedback_binarized"}):
        path = write_rows(tmp_path / f"{name}.jsonl", [{"a": 1}])
        assert f"`score_range` given, but format {name} reads no scores" in refusal(
            path, chat, format=name, score_range=(0.0, 4.0)
        )
