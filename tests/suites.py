"""Which cases of a test `make test` runs, and which `make test-long` alone."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def long_but(fast: Collection[Any], cases: Iterable[Any]) -> list[Any]:
    """For `parametrize` with one argument, or for a fixture's `params`: all cases, but those of `fast` marked `long`.

    Raises:
        AssertionError: a name of `fast` is no case, so that a case that was renamed is not lost to `make test`.
    """
    given = list(cases)
    assert all(case in given for case in fast), f"{fast} are not all among {given}"
    return [case if case in fast else pytest.param(case, marks=pytest.mark.long) for case in given]
