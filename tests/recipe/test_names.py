"""Names of other stacks lead to names that are ours."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from uft_ds.errors import UserError
from uft_ds.objectives.losses import LOSSES
from uft_ds.recipe.described import describe_keys
from uft_ds.recipe.file import recipe_from_tree
from uft_ds.recipe.names import _KEYS_ELSEWHERE, _LOSSES_ELSEWHERE, _NOT_HERE, unknown_key, unknown_loss
from uft_ds.recipe.schema import Recipe

DOCS = Path(__file__).parents[2] / "docs"
KEYS = {row.key for row in describe_keys()}


@pytest.mark.parametrize("theirs", _KEYS_ELSEWHERE)
def test_a_key_elsewhere_is_a_key_here(theirs: str) -> None:
    """Each answer names keys of a recipe, also where one of ours is spelt nearly alike."""
    leaves = {key.rpartition(".")[2] for key in KEYS} | set(Recipe.model_fields) - {"objective"}
    assert theirs not in leaves
    answer = unknown_key(theirs, leaves)
    assert answer.startswith("unknown key; here it is ")
    named = [word.rstrip(",") for word in re.findall(r"\b(?:[a-z_]+\.)+[a-z0-9_.]+,?", answer)]
    assert named or {"output", "tracking"} & set(answer.split()) or "loss: {pair:" in answer
    maps = {"objective.weights.binary"}
    assert set(named) <= KEYS | maps, answer


@pytest.mark.parametrize("theirs", _NOT_HERE)
def test_what_does_not_exist_here_is_said(theirs: str) -> None:
    """With keys that do, where there is one for the purpose."""
    assert theirs not in {key.rpartition(".")[2] for key in KEYS} | set(_KEYS_ELSEWHERE)
    answer = unknown_key(theirs, KEYS)
    assert answer.startswith("unknown key; ")
    assert "known here" not in answer
    assert set(re.findall(r"\b(?:model|lora|train|data)\.[a-z_.]*[a-z]", answer)) <= KEYS


@pytest.mark.parametrize("theirs", _LOSSES_ELSEWHERE)
def test_a_loss_elsewhere_is_a_loss_here(theirs: str) -> None:
    """Each answer names a loss of the table, whatever the case of the question."""
    answer = unknown_loss(theirs.upper(), LOSSES).partition("here it is ")[2]
    assert set(re.findall(r"[a-z0-9_]+", answer)) & set(LOSSES)
    assert theirs not in LOSSES


def test_a_slip_is_answered_by_the_nearest() -> None:
    """Or by all that are known."""
    assert unknown_loss("Dpo", LOSSES) == "unknown name 'Dpo'; here it is dpo"
    assert unknown_loss("dop", LOSSES).startswith("unknown name 'dop'; did you mean 'dpop'?")
    assert unknown_key("stepz", ("steps", "lr")) == "unknown key; did you mean 'steps'?"
    assert unknown_key("zzz", ("steps", "lr")) == "unknown key; known here: steps, lr"
    other = "unknown key; did you mean 'learning_rate'? Here it is train.lr"
    assert unknown_key("learnig_rate", ("steps", "lr")) == other
    assert unknown_key("Learning_Rates", ("steps", "lr"), ("train.lr", "train.steps")) == other


def test_a_start_and_a_reference_adapter_exclude_each_other() -> None:
    """The key's meaning says what the recipe does: they are refused together."""
    (meaning,) = (row.meaning for row in describe_keys() if row.key == "start.adapter")
    assert "not together with reference.adapter, which is the start and the reference" in meaning
    tree = {
        "name": "x",
        "model": {"base": "b"},
        "data": {"sources": [{"format": "jsonl", "path": "p"}]},
        "start": {"adapter": "a"},
        "output": "o",
    }
    recipe_from_tree(tree, "alone")
    with pytest.raises(UserError, match=r"start\.adapter: given together with reference\.adapter"):
        recipe_from_tree(tree | {"reference": {"adapter": "a"}}, "both")


def test_the_documents_objectives_are_objectives() -> None:
    """Every line of a recipe in the documents is one that a recipe takes."""
    blocks = re.findall(r"```yaml\n(.*?)```", (DOCS / "objectives.md").read_text(encoding="utf-8"), re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("objective:")]
    assert len(lines) >= 9
    for line in lines:
        tree = {"name": "x", "model": {"base": "b"}, "data": {"sources": [{"format": "jsonl", "path": "p"}]}}
        recipe_from_tree(tree | yaml.safe_load(line) | {"output": "o"}, line)
