"""What the loop says of a step before it runs."""

from __future__ import annotations

from typing import Any

import pytest
from toy import UFT

from uft_ds.checkpoint.state import TrainerState
from uft_ds.known.cache import Known
from uft_ds.training.forwarding import Method
from uft_ds.training.loop import Session

NOTHING: Any = None
"""Stands for what is not looked at."""


@pytest.mark.parametrize(
    ("step", "skipped", "starts_as_reference", "expected"),
    [(0, 0, True, True), (2, 2, True, True), (2, 1, True, False), (1, 0, True, False), (0, 0, False, False)],
)
def test_the_policy_is_the_reference_until_the_first_update(
    step: int, skipped: int, starts_as_reference: bool, expected: bool
) -> None:
    """A skipped step updates nothing; a policy that starts from an adapter of its own is not the reference."""
    method = Method(NOTHING, UFT, Known.of_reference("cached"), 64)
    session = Session(method, NOTHING, NOTHING, NOTHING, NOTHING, NOTHING, starts_as_reference=starts_as_reference)
    found = session.method_at(0.0, TrainerState(step, skipped))
    assert found.policy_is_reference == expected
