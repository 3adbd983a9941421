"""A small recipe, and how it is refused."""

import pytest

from uft_ds.errors import UserError
from uft_ds.recipe.file import load_recipe

MINIMAL = """\
name: small
model: {base: some/model}
data:
  sources:
    - {format: jsonl, path: a.jsonl}
    - {format: ultrachat, path: b.jsonl, examples: 5}
output: runs/small
"""


def refusal(recipe: str, *overrides: str) -> str:
    """The message of the UserError that loading raises; it names the recipe."""
    with pytest.raises(UserError) as caught:
        load_recipe(recipe, overrides)
    message = str(caught.value)
    assert all(line.startswith(f"recipe {recipe}") for line in message.splitlines()), message
    return message
