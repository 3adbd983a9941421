"""The interface of a source of steps. Fixed data (`mixture.Steps`) is one implementation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from uft_ds.data.mixture import Step
from uft_ds.data.own_answers import OwnAnswers

SourceState = Mapping[str, Any]
"""JSON values that a source needs to resume, besides the recipe, the data and the seed."""


class StepSource(Protocol):
    """The steps of a run, by number. Every rank has a source and asks it for the same steps in the same order.

    The content of step n depends on (recipe, data, seed, n) alone, not on the number of ranks, on a restart or on
    skipped steps. A source that creates its steps during the run keeps a record of them and names it in `state`.
    """

    def __len__(self) -> int:
        """The number of steps of the whole run."""
        ...

    def step(self, n: int) -> Step:
        """Step n, counted from 0."""
        ...

    @property
    def ended(self) -> str:
        """Why the run ends after the last accepted step, before its last one; empty: it goes on."""
        ...

    def accept(self, n: int, answers: OwnAnswers | None) -> Mapping[str, float]:
        """Check step n by what its forward has computed, after it and before the next step; nothing for fixed data.

        Args:
            answers: None: the step had no answers of its policy.
        Returns:
            metrics.
        Raises:
            CheckFailed: the step should not have been trained on; its update must not be saved.
        """
        ...

    def state(self) -> SourceState:
        """The state that a checkpoint keeps, after the last requested step; empty for fixed data."""
        ...

    def restore(self, state: SourceState) -> None:
        """Return to the position at which `state` was taken.

        Raises:
            UserError: `state` is not from this kind of source.
        """
        ...
