"""Ranks by role: global ranks divide into data ranks and, within them, sequence ranks."""

import pytest

from uft_ds.engine.ranks import Ranks, ranks_of


@pytest.mark.parametrize(("world_size", "sequence_size"), [(1, 1), (4, 1), (8, 2), (8, 8)])
def test_every_place_is_taken_by_one_global_rank(world_size: int, sequence_size: int) -> None:
    """A global rank and its roles name each other."""
    places = [ranks_of(rank, world_size, sequence_size=sequence_size) for rank in range(world_size)]
    assert [place.rank for place in places] == list(range(world_size))
    assert {place.world_size for place in places} == {world_size}
    roles = {(place.data_rank, place.sequence_rank) for place in places}
    assert roles == {(d, s) for d in range(world_size // sequence_size) for s in range(sequence_size)}


def test_ranks_that_share_sequences_are_neighbours() -> None:
    """Ranks 2 and 3 of four share the second data rank's sequences; one of them speaks for both."""
    second = [ranks_of(rank, 4, sequence_size=2) for rank in (2, 3)]
    assert second == [Ranks(1, 2, 0, 2), Ranks(1, 2, 1, 2)]
    assert [place.counts for place in second] == [True, False]
    assert [ranks_of(rank, 4, sequence_size=2).is_first for rank in range(4)] == [True, False, False, False]


def test_a_loss_is_multiplied_by_the_data_ranks() -> None:
    """Ranks that share sequences do not make the step larger."""
    assert ranks_of(0, 8).loss_factor == 8
    assert ranks_of(0, 8, sequence_size=4).loss_factor == 2


def test_places_that_do_not_exist_are_refused() -> None:
    """A rank outside of its size, and a world that groups do not divide."""
    with pytest.raises(ValueError, match="data rank 2 of 2"):
        Ranks(2, 2)
    with pytest.raises(ValueError, match="sequence rank 1 of 1"):
        Ranks(0, 1, 1, 1)
    with pytest.raises(ValueError, match="6 ranks cannot be divided into groups of 4"):
        ranks_of(0, 6, sequence_size=4)
