"""Pools of toy sequences, and plans over them."""

from typing import Any

from uft_ds.data.example import Sequence
from uft_ds.data.mixture import Ingredient, Steps, plan_steps
from uft_ds.data.store import Held


def held(*sequences: Sequence) -> Held:
    return Held(tuple(sequences))


def plan(*sources: tuple[Sequence, ...], **changes: Any) -> Steps:
    """Steps of eight responses over whole sources, one epoch."""
    ingredients = [Ingredient(f"source {i}", Held(source)) for i, source in enumerate(sources)]
    return plan_steps(ingredients, **{"seed": 0, "examples_per_step": 8, "epochs": 1, "steps": None} | changes)
