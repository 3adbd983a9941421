"""The recipes of tests hold what tests ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from runs import STEPS, recipe_in


@pytest.mark.parametrize(
    ("changes", "objective", "steps"),
    [
        ({}, {"loss": "mse", "beta": 0.1, "reward_shift": "ema"}, STEPS),
        ({"objective": {"loss": "nll"}, "train__steps": 2}, {"loss": "nll"}, 2),
        ({"objective__reward_shift": "kl", "objective": {"loss": "mse"}}, {"loss": "mse", "reward_shift": "kl"}, STEPS),
        ({"objective": {"loss": "mse"}, "objective__reward_shift": "kl"}, {"loss": "mse", "reward_shift": "kl"}, STEPS),
    ],
)
def test_a_key_beside_its_section_is_kept(
    tmp_path: Path, changes: dict[str, Any], objective: dict[str, Any], steps: int
) -> None:
    """In whatever order they are given; what such a recipe has by itself is not added to a section that is given."""
    recipe = yaml.safe_load(recipe_in(tmp_path, tmp_path / "base", **changes).read_text())
    assert recipe["objective"] == objective
    assert recipe["train"]["steps"] == steps
