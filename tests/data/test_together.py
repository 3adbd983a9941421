"""Answers to one prompt: drawn into the same step, each once an epoch, and nothing else changed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sources import rules, write_rows
from tiny import build_tiny_tokenizer

from uft_ds.data.mixture import Steps, plan_steps
from uft_ds.data.packing import rank_micro_batches
from uft_ds.data.sources import PreparedSource, SourceSettings, Tolerance, prepare_source
from uft_ds.data.together import MOST_TOGETHER, TogetherSource
from uft_ds.data.tokens.chat_tokenizer import ChatTokenizer
from uft_ds.data.tokens.tokenize import load_tokenizer


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return load_tokenizer(str(build_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))))


def prepared(folder: Path, chat: ChatTokenizer, rows: list[dict[str, Any]], **options: Any) -> PreparedSource:
    path = write_rows(folder / "rows.jsonl", rows)
    source = SourceSettings(str(path), None, rules(), **options)
    return prepare_source(source, chat, folder / "cache", seed=0, tolerance=Tolerance())


def scored(prompt: str, answers: int) -> list[dict[str, Any]]:
    return [{"prompt": prompt, "response": f"{prompt} {i}", "score": i / 20} for i in range(answers)]


def plan(source: Any, examples_per_step: int = 8, epochs: int = 2) -> Steps:
    return plan_steps([source], seed=0, examples_per_step=examples_per_step, epochs=epochs, steps=None)


def origins(steps: Steps) -> list[list[str]]:
    return [[Path(response.origin).name for response in step.responses] for step in steps]


def test_answers_to_one_prompt_are_in_one_step(tmp_path: Path, chat: ChatTokenizer) -> None:
    """Of ten prompts with four answers each and some with one; each response once an epoch."""
    rows = [row for i in range(10) for row in (*scored(f"q{i}", 4), *scored(f"single {i}", 1))]
    source = prepared(tmp_path, chat, rows)
    steps = plan(TogetherSource.of(source, 16))
    place = {origin: number for number, step in enumerate(origins(steps)) for origin in step if number < len(steps) / 2}
    assert set(Counter(origin for step in origins(steps) for origin in step).values()) == {2}
    for i in range(10):
        of_prompt = [place.get(f"rows.jsonl:{5 * i + number}") for number in range(1, 5)]
        assert len(set(of_prompt)) == 1, of_prompt
    # Drawn one by one they are apart.
    assert any(len(set(step)) == len(step) for step in origins(plan(source)))
    assert all(8 <= len(step) < 8 + 4 for step in origins(steps)[:-1])


def test_without_such_answers_the_order_is_the_same(tmp_path: Path, chat: ChatTokenizer) -> None:
    """Also where prompts are equal in length, or equal but not next to each other."""
    rows = [row for i in (1, 2, 3, 1, 2, 3) for row in scored(f"q{i}", 1)]
    source = prepared(tmp_path, chat, rows)
    together = TogetherSource.of(source, 8)
    assert together.selection is source.selection
    assert origins(plan(together, 2)) == origins(plan(source, 2))


def test_one_prompt_for_all_rows_makes_no_step_of_all(tmp_path: Path, chat: ChatTokenizer) -> None:
    """At most 16 responses are drawn together, and no more than a fourth of a step."""
    source = prepared(tmp_path, chat, [row for i in range(3) for row in scored("Write a poem.", 15)])
    for examples_per_step, most in ((64, MOST_TOGETHER), (20, 5)):
        counts = TogetherSource.of(source, examples_per_step).selection.responses_U
        assert counts.max() == most
        assert counts.sum() == 45


def test_pairs_of_one_prompt_keep_their_sides(tmp_path: Path, chat: ChatTokenizer) -> None:
    """Two pairs to one prompt are one unit of four sequences, whose pairs have ids that no other of the step has."""
    rows = [{"prompt": f"q{i // 2}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(12)]
    together = TogetherSource.of(prepared(tmp_path, chat, rows), 16)
    assert together.selection.responses_U.tolist() == [4] * 6
    (step,) = plan(together, 24, epochs=1)
    ids = Counter(response.pair_id for response in step.responses)
    assert (len(ids), set(ids.values())) == (12, {2})
    assert [len(unit) for unit in step.units] == [2] * 12
    assert together.selection.keys_of(0) == tuple(
        key for sequence in together.selection.unit(0) for key in sequence.response_keys
    )
    assert np.array_equal(together.selection.keys_R, prepared(tmp_path, chat, rows).selection.keys_R)


def test_pairs_of_two_sources_have_ids_of_their_own(tmp_path: Path, chat: ChatTokenizer) -> None:
    """One source with two pairs to each prompt, which are drawn together, and one with a pair to each."""
    pairs = [{"prompt": f"q{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(40)]
    two = [row | {"prompt": f"p{i // 2}"} for i, row in enumerate(pairs)]
    sources = [TogetherSource.of(prepared(tmp_path / str(n), chat, rows), 16) for n, rows in enumerate((two, pairs))]
    steps = plan_steps(sources, seed=0, examples_per_step=16, epochs=1, steps=None)
    for step in steps:
        assert set(Counter(response.pair_id for response in step.responses).values()) == {2}
        for batch in rank_micro_batches(step, tokens_per_micro_batch=2048, rank=0, world_size=1):
            assert len(batch.pairs) * 2 == batch.num_responses
    assert sum(len(step.responses) for step in steps) == 160


def test_a_selection_of_rows_is_grouped_by_what_it_holds(tmp_path: Path, chat: ChatTokenizer) -> None:
    """`examples` draws rows: the answers of one row stay together, the last conversation may be cut."""
    rows = [{"prompt": f"q{i}", "chosen": "good", "rejected": "bad"} for i in range(9)]
    source = prepared(tmp_path, chat, rows, examples=8)
    assert TogetherSource.of(source, 8).selection is source.selection
    talks = [
        {
            "messages": [
                {"role": role, "content": f"{role} {turn}"} for turn in range(3) for role in ("user", "assistant")
            ]
        }
        for _ in range(4)
    ]
    cut = prepared(tmp_path / "talks", chat, talks, examples=7)
    assert TogetherSource.of(cut, 64).selection.responses_U.sum() == 7
