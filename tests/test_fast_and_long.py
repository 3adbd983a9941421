"""What `make test` runs of all tests, and in which order."""

from __future__ import annotations

from pathlib import Path

import pytest
from suites import FOLDERS, SLOWEST, long_but, slowest_first

TESTS = Path(__file__).parent


def test_all_but_the_chosen_cases_are_long() -> None:
    """In the order of the cases."""
    one, two, three = long_but(["b"], ["a", "b", "c"])
    assert two == "b"
    assert [case.values for case in (one, three)] == [("a",), ("c",)]
    assert [[mark.name for mark in case.marks] for case in (one, three)] == [["long"]] * 2


def test_a_chosen_case_that_is_none_is_an_error() -> None:
    """A case that was renamed would silently be long alone."""
    with pytest.raises(AssertionError, match="are not all among"):
        long_but(["d"], ["a", "b"])


def test_files_of_the_order_exist() -> None:
    """A slow file that was renamed would come last, and a worker would run it alone."""
    assert [name for name in SLOWEST if not (TESTS / name).exists()] == []
    assert all((TESTS / folder).is_dir() for folder in FOLDERS)


def test_slow_files_and_runs_on_ranks_come_first() -> None:
    names = ("test_docs.py", "distributed/test_variants.py", "planning/test_plan.py", "slurm/test_jobs.py")
    assert sorted(names, key=lambda name: slowest_first(TESTS / name)) == list(reversed(names))
