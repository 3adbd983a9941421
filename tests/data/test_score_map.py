"""Scores that stand for those a source gave: within 0 and 1, in the same order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sources import rules, write_rows
from tiny import build_tiny_tokenizer

from uft_ds.data.score_map import affine, quantiles
from uft_ds.data.sources import PreparedSource, SourceSettings, Tolerance, prepare_source
from uft_ds.data.tokens.chat_tokenizer import ChatTokenizer
from uft_ds.data.tokens.tokenize import load_tokenizer
from uft_ds.errors import UserError


def test_affine_by_hand() -> None:
    """0.9 s + 0.05 of 0, 0.5 and 1."""
    mapped = affine(np.array([1.0, 0.0, 0.5, 0.5]), 0.9, 0.05)
    assert [mapped(score) for score in (0.0, 0.5, 1.0)] == pytest.approx([0.05, 0.5, 0.95], abs=1e-12)


def test_affine_leaves_nothing_clipped() -> None:
    """2 s would make 1.2 of 0.6: refused, with the score that is furthest out and the range."""
    with pytest.raises(ValueError, match=r"\[2, 0\] makes 1.2 of score 0.6; expected 0 to 1 .* from 0.1 to 0.6"):
        affine(np.array([0.1, 0.6]), 2.0, 0.0)
    with pytest.raises(ValueError, match=r"makes -0.1 of score 0"):
        affine(np.array([0.0, 0.6]), 1.0, -0.1)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
def test_affine_keeps_the_order(scale: float) -> None:
    """A scale of 0 makes all alike, a negative one prefers the worse."""
    with pytest.raises(ValueError, match="does not keep the order"):
        affine(np.array([0.0, 1.0]), scale, 1.0)


def test_affine_at_the_ends_is_not_refused_for_rounding() -> None:
    """0.7 x 1 + 0.3 is 1, whatever the floats add up to."""
    for tenth in range(1, 11):
        assert affine(np.array([0.0, 1.0]), tenth / 10, 1 - tenth / 10)(1.0) == 1.0


def test_quantiles_by_hand() -> None:
    """Scores 0, 0.5, 0.5, 1: a quarter of 1/2, 1/4 + a half of 2/4, and 7/8."""
    mapped = quantiles(np.array([0.5, 1.0, 0.0, 0.5]))
    assert [mapped(score) for score in (0.0, 0.5, 1.0)] == [0.125, 0.5, 0.875]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=50))
def test_quantiles_keep_the_order_and_have_a_mean_of_one_half(scores: list[float]) -> None:
    """Whatever the scores: inside (0, 1), rising where they rise, one half on average."""
    mapped = quantiles(np.array(scores))
    found = [mapped(score) for score in scores]
    assert np.mean(found) == pytest.approx(0.5)
    assert 0 < min(found) <= max(found) < 1
    for (low, a), (high, b) in zip(
        sorted(zip(scores, found, strict=True)), sorted(zip(scores, found, strict=True))[1:], strict=False
    ):
        assert (a < b) == (low < high)


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return load_tokenizer(str(build_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))))


def prepared(tmp_path: Path, chat: ChatTokenizer, rows: list[dict[str, Any]], **more: Any) -> PreparedSource:
    source = SourceSettings(str(write_rows(tmp_path / "rows.jsonl", rows)), None, rules(), **more)
    return prepare_source(source, chat, tmp_path / "cache", seed=0, tolerance=Tolerance())


def scores(source: PreparedSource) -> list[float]:
    units = [source.selection.unit(index) for index in range(len(source.selection))]
    return [response.score for unit in units for sequence in unit for response in sequence.responses]


def test_a_source_gives_mapped_scores(tmp_path: Path, chat: ChatTokenizer) -> None:
    """Through the selection, for scored responses and for both sides of pairs; the tokens on disk stay the same."""
    rows = [{"prompt": f"q{i}", "response": "a", "score": i / 4} for i in range(5)]
    given = prepared(tmp_path, chat, rows)
    halved = prepared(tmp_path, chat, rows, score_map=(0.5, 0.25))
    ranked = prepared(tmp_path, chat, rows, score_map="quantile")
    assert scores(given) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert scores(halved) == pytest.approx([0.25, 0.375, 0.5, 0.625, 0.75])
    assert scores(ranked) == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9])
    assert given.key == halved.key == ranked.key
    pairs = [{"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": 0.9, "score_rejected": 0.1}]
    assert scores(prepared(tmp_path, chat, pairs, score_map=(0.5, 0.0))) == pytest.approx([0.45, 0.05])


def test_only_what_is_drawn_is_ranked(tmp_path: Path, chat: ChatTokenizer) -> None:
    """Of two examples drawn from five the ranks are 1/4 and 3/4."""
    rows = [{"prompt": f"q{i}", "response": "a", "score": i / 4} for i in range(5)]
    assert sorted(scores(prepared(tmp_path, chat, rows, score_map="quantile", examples=2))) == [0.25, 0.75]


def test_a_map_out_of_range_is_refused_by_its_source(tmp_path: Path, chat: ChatTokenizer) -> None:
    """The message names the source."""
    rows = [{"prompt": "q", "response": "a", "score": 0.75}]
    with pytest.raises(UserError, match=r"rows.jsonl: score_map \[2, 0\] makes 1.5 of score 0.75"):
        prepared(tmp_path, chat, rows, score_map=(2.0, 0.0))


def test_quantiles_of_one_score_are_refused(tmp_path: Path, chat: ChatTokenizer) -> None:
    """Instruction data would become 0.5 throughout: nothing would be learned."""
    with pytest.raises(UserError, match="quantile, but instruction data has one score"):
        prepared(tmp_path, chat, [{"prompt": "q", "response": "a"}], score_map="quantile")


def test_a_label_stays_good_or_bad(tmp_path: Path, chat: ChatTokenizer) -> None:
    """0.9 s + 0.05 softens labels; 0.5 s + 0.5 would make bad ones count as good."""
    rows = [{"prompt": f"q{i}", "response": "a", "label": bool(i % 2)} for i in range(4)]
    assert sorted(scores(prepared(tmp_path, chat, rows, score_map=(0.9, 0.05)))) == [0.05, 0.05, 0.95, 0.95]
    with pytest.raises(UserError, match="must leave bad labels below"):
        prepared(tmp_path, chat, rows, score_map=(0.5, 0.5))
