"""Which recipes a resume takes for the recipe of the run."""

from __future__ import annotations

from pathlib import Path

import pytest

from uft_ds.recipe.file import recipe_from_tree, stored_recipe
from uft_ds.recipe.settings import Settings
from uft_ds.recipe.to_settings import settings_of
from uft_ds.record.run_folder import RunFolder
from uft_ds.run.resume import recipe_changes

COMMIT, OTHER = "a" * 40, "b" * 40


def settings(revision: str | None) -> Settings:
    data = {"sources": [{"format": "jsonl", "path": "rows.jsonl"}]}
    tree = {"name": "x", "model": {"base": "owner/name", "revision": revision}, "data": data, "output": "o"}
    return settings_of(recipe_from_tree(tree, "x"))


@pytest.mark.parametrize(
    ("given", "changes"),
    [
        (None, {}),
        ("v1.0", {}),
        ("main", {}),
        (COMMIT, {}),
        (OTHER, {"model.revision": (COMMIT, OTHER)}),
    ],
)
def test_a_tag_is_not_compared_with_its_commit(
    tmp_path: Path, given: str | None, changes: dict[str, tuple[str, str]]
) -> None:
    """The run's recipe holds the commit; whether a tag still means it is told by the base's content."""
    folder = RunFolder(tmp_path)
    folder.recipe.write_text(stored_recipe(settings(COMMIT).stored))
    assert recipe_changes(folder, settings(given)) == changes
