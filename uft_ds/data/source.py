"""The interface of a source of steps. Fixed data (`mixture.Steps`) is one implementation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from uft_ds.data.mixture import Step

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

    def accept(self, n: int, served_R3: np.ndarray | None) -> Mapping[str, float]:
        """Check step n by what its forward has computed, after it and before the next step; nothing for fixed data.

        Args:
            served_R3: [responses, 3], of the responses whose generator has said its log-prob: our own log-prob and the
                generator's, nats, summed over tokens, and the number of tokens. The same on every rank; None: of none.
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
