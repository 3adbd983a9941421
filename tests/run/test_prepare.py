"""What is refused of a recipe's data before anything is launched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sources import write_rows
from tiny import build_tiny_tokenizer

from uft_ds.data.tokens.chat_tokenizer import ChatTokenizer
from uft_ds.data.tokens.tokenize import load_tokenizer
from uft_ds.errors import UserError
from uft_ds.recipe.file import recipe_from_tree
from uft_ds.recipe.settings import Settings, settings_of
from uft_ds.run.prepare import PreparedData, prepare_data, steps_of


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return load_tokenizer(str(build_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))))


def prepared(
    chat: ChatTokenizer, folder: Path, train: dict[str, Any], *portions: dict[str, Any]
) -> tuple[Settings, PreparedData]:
    """Sources of 100 rows each, with their portions."""
    sources = []
    for number, portion in enumerate(portions):
        rows = [{"prompt": f"q{number} {i}", "response": "a"} for i in range(100)]
        sources.append({"format": "jsonl", "path": str(write_rows(folder / f"{number}.jsonl", rows)), **portion})
    data = {"sources": sources, "cache_dir": str(folder / "tokens"), "max_length": 64, "workers": 1}
    tree = {"name": "x", "model": {"base": "b"}, "data": data, "objective": {}, "output": "o", "train": train}
    settings = settings_of(recipe_from_tree(tree, "x"))
    return settings, prepare_data(settings, chat)


@pytest.mark.parametrize("train", [{}, {"steps": 3}])
def test_a_mixture_of_no_steps_is_refused(chat: ChatTokenizer, tmp_path: Path, train: dict[str, Any]) -> None:
    """With the keys that make it so, what it holds and what a step takes; also where it would be repeated for ever."""
    with pytest.raises(UserError) as refused:
        prepared(chat, tmp_path, train, {"epochs": 0.004}, {"share": 0.5})
    first, second, rest = str(refused.value).splitlines()
    assert first == "data.sources.0.epochs: 0.004 given, which takes 0.4 of 100 responses"
    assert second == "data.sources.1.share: 0.5 given, which takes 0.4 of 100 responses"
    assert "holds 0.8 responses" in rest
    assert "a step takes 64 (train.examples_per_step)" in rest


@pytest.mark.parametrize(
    ("train", "portion"), [({}, {"epochs": 0.005}), ({"epochs": 2}, {"epochs": 0.004}), ({"steps": 1}, {"epochs": 1})]
)
def test_a_mixture_of_one_response_is_a_step(
    chat: ChatTokenizer, tmp_path: Path, train: dict[str, Any], portion: dict[str, Any]
) -> None:
    """Half a row is rounded up, and two epochs of 0.4 rows hold one: the run has a step."""
    assert len(steps_of(*prepared(chat, tmp_path, train, portion))) == 1
