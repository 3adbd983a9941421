"""Where a run's steps come from: fixed data is one source, and whatever gives a step by its number another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from uft_ds.data.mixture import Step

SourceState = Mapping[str, Any]
"""What a restart needs of a source besides the recipe, the data and the seed: JSON values."""


class StepSource(Protocol):
    """The steps of a run, by number: every rank has one, and asks it for the same steps in the same order.

    The content of step n depends on (recipe, data, seed, n) alone: not on the number of ranks, a restart, or what was
    skipped. A source that makes its steps while the run goes on keeps a record of them and names it in `state`.
    """

    def __len__(self) -> int:
        """The number of steps of the whole run."""
        ...

    def step(self, n: int) -> Step:
        """Step n, counted from 0."""
        ...

    def state(self) -> SourceState:
        """What a checkpoint keeps of it, after the last step that was asked for; empty for fixed data."""
        ...

    def restore(self, state: SourceState) -> None:
        """Go to where `state` was taken.

        Raises:
            UserError: it is not a state of such a source.
        """
        ...
