"""Which held-out prompts are answered while training."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from pools import Held
from transformers import LlamaConfig

from uft_ds.data.example import Response, Sequence
from uft_ds.errors import UserError
from uft_ds.recipe.schema import TrainSection
from uft_ds.recipe.settings import TrainSettings
from uft_ds.recipe.to_settings import train_settings
from uft_ds.training.samples import check_samples, choose_prompts, longest_prompt


def sequence(prompt: list[int], answer: int, name: str, pair: int | None = None) -> Sequence:
    kind = "score" if pair is None else "pair"
    response = Response(len(prompt), len(prompt) + 1, 0.5, kind, name, pair)
    return Sequence(np.array([*prompt, answer], dtype=np.int32), (response,))


def test_prompts_come_from_all_sources_in_turn() -> None:
    """Each prompt once, with the first response to it: of a pair the chosen one, of a conversation the first one."""
    talk = Sequence(
        np.arange(9, dtype=np.int32), (Response(2, 4, 1.0, "instruction", "c:1"), Response(6, 9, 1.0, "instruction"))
    )
    scored = Held((sequence([5, 6], 7, "a:1"), sequence([5, 6], 8, "a:2"), sequence([5, 7], 8, "a:3")))
    pairs = Held((sequence([1], 2, "b:1", 0), sequence([1], 3, "b:1", 0)))
    chosen = choose_prompts([scored, pairs, Held((talk,))], 9, None)
    assert [(prompt.origin, prompt.token_ids, prompt.response_ids) for prompt in chosen] == [
        ("a:1", (5, 6), (7,)),
        ("b:1", (1,), (2,)),
        ("c:1", (0, 1), (2, 3)),
        ("a:3", (5, 7), (8,)),
    ]
    assert [prompt.kind for prompt in chosen] == ["score", "pair", "instruction", "score"]
    assert choose_prompts([scored, pairs], 2, None) == chosen[:2]
    assert [prompt.origin for prompt in choose_prompts([scored, pairs], 9, 1)] == ["b:1"], "two tokens are too many"
    assert choose_prompts([], 9, None) == ()


def settings(**changes: Any) -> TrainSettings:
    return train_settings(TrainSection(**changes))


def test_a_prompt_leaves_room_for_its_answer() -> None:
    """Of the model's positions; of those up to which its rotary embeddings keep their frequencies, if it has fewer."""
    config = LlamaConfig(max_position_embeddings=100)
    assert longest_prompt(settings(samples=1, sample_tokens=30), config) == 70
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 50}
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    changing = LlamaConfig(max_position_embeddings=100, head_dim=16, rope_parameters=rope | factors)
    assert longest_prompt(settings(samples=1, sample_tokens=30), changing) == 20
    unlimited = SimpleNamespace(get_text_config=SimpleNamespace)
    assert longest_prompt(settings(samples=1), unlimited) is None


def test_answers_that_fit_nowhere_are_refused() -> None:
    """Before the launch, naming the key; a run without samples needs no prompt."""
    config = LlamaConfig(max_position_embeddings=100)
    check_samples(settings(), config, ())
    with pytest.raises(UserError, match=r"train\.sample_tokens: 99 given, .* of the 100 positions .* lower it"):
        check_samples(settings(samples=2, sample_tokens=99), config, ())
