"""How rows are dealt out to batches and ranks."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from uft_ds.evaluation.decoding import Row
from uft_ds.evaluation.on_ranks import batches_of, shares_of


@given(st.lists(st.integers(1, 50), min_size=1, max_size=20), st.integers(1, 4), st.integers(1, 200))
def test_every_row_is_in_one_batch_that_fits(lengths: list[int], ranks: int, budget: int) -> None:
    """No rank holds more tokens than allowed, unless of a single row; all ranks have as many batches."""
    rows = [Row((0,) * length) for length in lengths]
    batches = batches_of(rows, ranks, 10, budget)
    assert sorted(place for batch in batches for place in batch) == list(range(len(lengths)))
    for batch in batches:
        shares = shares_of(batch, ranks)
        assert len(shares) == ranks
        assert [place for share in shares for place in share] == batch
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        for share in shares:
            held = len(share) * (max(lengths[place] for place in batch) + 10)
            assert held <= budget or len(share) == 1 or not share


def test_answers_to_one_prompt_stay_together() -> None:
    """Rows of a prompt are neighbours on a rank, the longest prompts first."""
    rows = [Row((1, 2), seed) for seed in range(4)] + [Row((3, 4, 5), seed) for seed in range(4)]
    (batch,) = batches_of(rows, 2, 10, 4 * 13)
    assert shares_of(batch, 2) == [[4, 5, 6, 7], [0, 1, 2, 3]]
