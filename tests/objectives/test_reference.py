"""One vocabulary for how a run has its reference."""

import pytest

from uft_ds.objectives.reference import HowReference, how_known, is_forwarded_each_time


@pytest.mark.parametrize("cached", [True, False])
def test_without_a_loss_that_compares_there_is_no_reference(cached: bool) -> None:
    """Whatever the recipe says of the cache."""
    assert how_known(needed=False, cached=cached, forwarded="lockstep") == "none"


def test_a_reference_is_cached_or_forwarded_as_the_recipe_says() -> None:
    """The way of the forward counts where nothing is remembered."""
    assert how_known(needed=True, cached=True, forwarded="separate") == "cached"
    assert how_known(needed=True, cached=False, forwarded="separate") == "separate"
    assert how_known(needed=True, cached=False, forwarded="lockstep") == "lockstep"


@pytest.mark.parametrize(
    ("how", "expected"), [("none", False), ("cached", False), ("lockstep", True), ("separate", True)]
)
def test_each_response_is_forwarded_where_nothing_is_remembered(how: HowReference, expected: bool) -> None:
    """Neither without a reference, nor with a cached one."""
    assert is_forwarded_each_time(how) is expected
