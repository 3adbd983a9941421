"""Prompts of an online source: tokenised as the prompts of any other answer, and counted by their answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sources import rules, write_rows
from tiny import build_tiny_tokenizer

from uft_ds.data.asked import AskedSource
from uft_ds.data.mixture import Portion, plan_steps
from uft_ds.data.packing import rank_micro_batches
from uft_ds.data.sources import AskedSettings, PreparedData, PreparedSource, SourceSettings, Tolerance, prepare_source
from uft_ds.data.tokens.chat_tokenizer import ChatTokenizer
from uft_ds.data.tokens.tokenize import load_tokenizer
from uft_ds.errors import UserError

ANSWER_TOKENS = 7


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return load_tokenizer(str(build_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))))


def prepared(folder: Path, chat: ChatTokenizer, rows: list[dict[str, Any]], **more: Any) -> PreparedSource:
    path = write_rows(folder / f"rows{len(list(folder.glob('*.jsonl')))}.jsonl", rows)
    asked = more.pop("answers", None)
    source = SourceSettings(
        str(path),
        None,
        rules(format=more.pop("format", "prompts")),
        allow_one_score=True,
        asked=None if asked is None else AskedSettings(asked, ANSWER_TOKENS),
        **more,
    )
    return prepare_source(source, chat, folder / "cache", seed=0, tolerance=Tolerance())


def test_a_prompt_has_the_tokens_that_it_has_before_an_answer(tmp_path: Path, chat: ChatTokenizer) -> None:
    """By the other format, with an answer in the data; of text and of turns."""
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "2 + 2"},
    ]
    prompts = [{"prompt": "Say something."}, {"messages": turns}]
    asked = AskedSource.of(prepared(tmp_path, chat, prompts, answers=3)).selection
    answered = prepared(tmp_path, chat, [row | {"response": "four", "score": 0.5} for row in prompts], format="jsonl")
    for index in range(2):
        (sequence,) = answered.selection.unit(index)
        np.testing.assert_array_equal(asked.prompt(index).token_ids_T, sequence.token_ids_T[: sequence.prompt_tokens])


def test_the_mixture_counts_answers(tmp_path: Path, chat: ChatTokenizer) -> None:
    """Half of all responses are answers: twice as many prompts' answers as their share asks for would be 12."""
    online = prepared(
        tmp_path, chat, [{"prompt": f"q{i}"} for i in range(6)], answers=4, portion=Portion(share=((0.0, 0.5),))
    )
    fixed = prepared(tmp_path, chat, [{"prompt": f"f{i}", "response": "yes"} for i in range(12)], format="jsonl")
    assert PreparedData((online, fixed), ()).epoch_amounts == [12.0, 12.0]
    steps = plan_steps([AskedSource.of(online), fixed], seed=0, examples_per_step=8, epochs=1, steps=None)
    assert sum(len(step.responses) for step in steps) == 24
    drawn = [unit for n in range(len(steps)) for unit in steps.drawn(n)]
    assert [source for source, _ in drawn].count(0) == 3
    assert [source for source, _ in drawn].count(1) == 12


def test_the_step_by_its_units_is_the_step(tmp_path: Path, chat: ChatTokenizer) -> None:
    """`step_of` gives each unit's place and pair number as the plan itself would."""
    rows = [{"prompt": f"q{i}", "chosen": "good", "rejected": "bad"} for i in range(5)]
    source = prepared(tmp_path, chat, rows, format="jsonl")
    steps = plan_steps([source], seed=0, examples_per_step=4, epochs=1, steps=None)
    for n in range(len(steps)):
        again = steps.step_of(n, lambda _, unit, pair_id: source.selection.unit(unit, pair_id))
        assert [s.pair_id for s in again.sequences] == [s.pair_id for s in steps[n].sequences]
        assert [r.origin for r in again.responses] == [r.origin for r in steps[n].responses]


def test_stand_ins_are_as_long_as_an_answer_may_be(tmp_path: Path, chat: ChatTokenizer) -> None:
    """They can be packed, each with a response of its own."""
    source = AskedSource.of(prepared(tmp_path, chat, [{"prompt": "q"}], answers=3))
    steps = plan_steps([source], seed=0, examples_per_step=3, epochs=1, steps=None)
    (step,) = steps
    assert [response.num_tokens for response in step.responses] == [ANSWER_TOKENS] * 3
    (batch,) = rank_micro_batches(step, tokens_per_micro_batch=512, rank=0, world_size=1)
    assert batch.num_responses == 3


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "2 + 2"}, "expected either 'prompt' or 'messages', found neither"),
        ({"prompt": "q", "messages": [{"role": "user", "content": "q"}]}, "found both"),
        ({"prompt": "q", "response": "an answer"}, "'response' \\(an answer\\)"),
        (
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
            "must end with the user",
        ),
        ({"prompt": "  "}, "'prompt' is empty"),
    ],
)
def test_rows_that_are_no_prompts_are_refused(
    tmp_path: Path, chat: ChatTokenizer, row: dict[str, Any], message: str
) -> None:
    """By file and line, with what was expected."""
    with pytest.raises(UserError, match=message) as caught:
        prepared(tmp_path, chat, [row], answers=2)
    assert "rows0.jsonl:1" in str(caught.value)


def test_columns_for_the_scorer_are_kept(tmp_path: Path, chat: ChatTokenizer) -> None:
    """Any column that the format does not read, and what an object `meta` holds."""
    from uft_ds.rollouts.prompts import read_prompts

    rows = [{"prompt": "2 + 2", "solution": "4", "meta": {"level": 1}}, {"prompt": "3 + 3", "solution": "6"}]
    source = prepared(tmp_path, chat, rows, answers=2)
    texts = read_prompts(source)
    assert [text.meta for _, text in sorted(texts.items())] == [{"solution": "4", "level": 1}, {"solution": "6"}]
    assert set(texts) == {AskedSource.of(source).selection.origin(index) for index in range(2)}
    item = texts[AskedSource.of(source).selection.origin(0)].item("five", "place", 3)
    assert (item.messages[-1].content, item.response, item.row) == ("2 + 2", "five", 3)


def test_prompts_that_have_changed_since_are_refused(tmp_path: Path, chat: ChatTokenizer) -> None:
    """A scorer would be given another question than the policy has answered."""
    from uft_ds.rollouts.prompts import read_prompts

    source = prepared(tmp_path, chat, [{"prompt": "q1"}, {"prompt": "q2"}], answers=2)
    Path(source.settings.path).write_text(json.dumps({"prompt": "q1"}) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match="the prompt is no longer there"):
        read_prompts(source)
