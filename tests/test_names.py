"""Names of other stacks lead to names that are ours."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from uft_ds.names import _KEYS_ELSEWHERE, _LOSSES_ELSEWHERE, unknown_key, unknown_loss
from uft_ds.objectives.losses import LOSSES
from uft_ds.recipe import describe_keys
from uft_ds.recipe_file import recipe_from_tree

DOCS = Path(__file__).parents[1] / "docs"
KEYS = {key for key, _, _ in describe_keys()}


@pytest.mark.parametrize("theirs", _KEYS_ELSEWHERE)
def test_a_key_elsewhere_is_a_key_here(theirs: str) -> None:
    """Each answer names keys of a recipe, and no key of ours is taken for a foreign one."""
    answer = unknown_key(theirs, ())
    assert answer.startswith("unknown key; here it is ")
    named = [word.rstrip(",") for word in re.findall(r"\b(?:[a-z_]+\.)+[a-z0-9_.]+,?", answer)]
    assert named or {"output", "tracking"} & set(answer.split()) or "loss: {pair:" in answer
    assert set(named) <= KEYS, answer


@pytest.mark.parametrize("theirs", _LOSSES_ELSEWHERE)
def test_a_loss_elsewhere_is_a_loss_here(theirs: str) -> None:
    """Each answer names a loss of the table, whatever the case of the question."""
    answer = unknown_loss(theirs.upper(), LOSSES).partition("here it is ")[2]
    assert set(re.findall(r"[a-z0-9_]+", answer)) & set(LOSSES)
    assert theirs not in LOSSES


def test_the_nearest_key_comes_first() -> None:
    """A slip of the finger is likelier than another stack."""
    assert unknown_key("stepz", ("steps", "lr")) == "unknown key; did you mean 'steps'?"
    assert unknown_key("zzz", ("steps", "lr")) == "unknown key; known here: steps, lr"


def test_the_documents_objectives_are_objectives() -> None:
    """Every line of a recipe in the documents is one that a recipe takes."""
    blocks = re.findall(r"```yaml\n(.*?)```", (DOCS / "objectives.md").read_text(encoding="utf-8"), re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("objective:")]
    assert len(lines) >= 9
    for line in lines:
        tree = {"name": "x", "model": {"base": "b"}, "data": {"sources": [{"format": "jsonl", "path": "p"}]}}
        recipe_from_tree(tree | yaml.safe_load(line) | {"output": "o"}, line)
