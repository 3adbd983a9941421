"""Which runs share an owner: those that would be the same run, wherever their inputs lie."""

from __future__ import annotations

from typing import Any

import pytest

from uft_ds.recipe.file import recipe_from_tree
from uft_ds.recipe.settings import Settings
from uft_ds.recipe.to_settings import changed, settings_of
from uft_ds.run.identity import owner

IDENTITY = {"base": {"weights": ["a"]}, "adapter": None, "data": {"sources.0": {"content": "b"}}}


def settings() -> Settings:
    data = {"sources": [{"format": "jsonl", "path": "rows.jsonl"}]}
    return settings_of(recipe_from_tree({"name": "x", "model": {"base": "b"}, "data": data, "output": "o"}, "x"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("output", "other"),
        ("name", "y"),
        ("launch.ranks", 4),
        ("data.sources.0.path", "moved.jsonl"),
        ("model.base", "c"),
    ],
)
def test_places_and_ranks_change_no_owner(key: str, value: Any) -> None:
    """A moved or copied run keeps its checkpoints."""
    assert owner(changed(settings(), {key: value}), IDENTITY) == owner(settings(), IDENTITY)


@pytest.mark.parametrize(("key", "value"), [("train.seed", 7), ("train.lr", 1.0), ("objective.beta", 0.5)])
def test_what_decides_a_step_changes_the_owner(key: str, value: Any) -> None:
    """Of the recipe alone."""
    other = owner(changed(settings(), {key: value}), IDENTITY)
    assert other.recipe != owner(settings(), IDENTITY).recipe
    assert other.identity == owner(settings(), IDENTITY).identity


def test_other_content_changes_the_owner() -> None:
    """Another base or other rows."""
    other = owner(settings(), {**IDENTITY, "base": {"weights": ["c"]}})
    assert other.identity != owner(settings(), IDENTITY).identity
