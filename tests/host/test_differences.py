"""Two records of settings, and what a user is told of their difference."""

from typing import Any

import pytest

from uft_ds.host.differences import differences


@pytest.mark.parametrize(
    ("before", "now", "sentences"),
    [
        ({"a": 1}, {"a": 1}, []),
        (
            {"a": {"b": [1], "c": "x"}},
            {"a": {"b": [2], "c": "y"}},
            ["a.b: [1] there, [2] now", 'a.c: "x" there, "y" now'],
        ),
        ({"a": 1, "b": 2}, {"a": 1}, ["b: 2 there, nothing now"]),
        ({}, {"b": "x" * 100}, [f'b: nothing there, "{"x" * 56}... now']),
        ({"a": {"b": 1}}, {"a": 1}, ['a: {"b": 1} there, 1 now']),
    ],
)
def test_every_difference_is_named_with_both_values(before: Any, now: Any, sentences: list[str]) -> None:
    """In the order of the keys; values are shortened."""
    assert differences(before, now) == sentences
