"""Batches of requests: each request once, as large as allowed, and the same whatever has been answered."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from uft_ds.evaluation.harness.batches import MOST_ROWS, BatchSize, CutQuestions, cut, grouped


def test_rows_follow_from_the_longest_row_of_a_batch() -> None:
    """100 tokens: rows of 60 alone, then 40 and 30 together, then 20, 10 and 5."""
    widths = dict(enumerate((60, 40, 30, 20, 10, 5)))
    assert cut([[place] for place in range(6)], widths, BatchSize(tokens=100)) == [[0], [1, 2], [3, 4, 5]]


def test_a_question_is_cut_once() -> None:
    """However many of its choices are; those of another task have the same numbers."""
    found = CutQuestions()
    for task, question in (("arc", 0), ("arc", 0), ("arc", 0), ("arc", 3), ("hella", 0)):
        found.add(task, question)
    assert found.by_task() == {"arc": 2, "hella": 1}


def test_a_row_of_several_requests_counts_once() -> None:
    """Requests that differ in their last token share one."""
    assert cut([[3, 1], [0], [2]], {3: 10, 0: 10, 2: 10}, BatchSize(rows=2)) == [[3, 1, 0], [2]]


@given(st.lists(st.integers(1, 400), min_size=1, max_size=60), st.integers(1, 1000))
def test_every_request_is_in_one_batch(lengths: list[int], tokens: int) -> None:
    """And no batch has more tokens, padding included, than allowed, unless its one row has."""
    lengths.sort(reverse=True)
    batches = cut([[place] for place in range(len(lengths))], dict(enumerate(lengths)), BatchSize(tokens=tokens))
    assert sorted(place for batch in batches for place in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * lengths[batch[0]] <= tokens
        assert len(batch) <= MOST_ROWS


def test_equal_keys_are_grouped_in_their_first_order() -> None:
    """The places of each key."""
    assert grouped(["b", "a", "b", "c", "a"]) == [[0, 2], [1, 4], [3]]
