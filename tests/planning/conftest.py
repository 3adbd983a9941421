"""Plans of one model share what is measured of it, whichever test makes them: a model's activations take a second."""

from typing import Any

import pytest

from uft_ds.planning import plan
from uft_ds.planning.planner import Planner


@pytest.fixture(scope="session")
def planners() -> dict[str, Planner]:
    """By the content of the model's config."""
    return {}


@pytest.fixture(autouse=True)
def shared_planners(planners: dict[str, Planner], monkeypatch: pytest.MonkeyPatch) -> None:
    """`make_plan` without a planner takes the one that plans of the same model took before."""

    def planner_of(config: Any) -> Planner:
        return planners.setdefault(repr(config.to_dict()), Planner(config))

    monkeypatch.setattr(plan, "Planner", planner_of)
