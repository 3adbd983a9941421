"""Ranks by role: global ranks divide into data ranks and, within them, sequence ranks."""

import re

import deepspeed
import pytest
from torch.distributed import DistNetworkError

from uft_ds.engine.ranks import Ranks, init_distributed, ranks_of
from uft_ds.errors import UserError


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


def test_a_loss_is_multiplied_by_all_ranks() -> None:
    """ZeRO divides by them, whether they share sequences or not."""
    assert ranks_of(0, 8).loss_factor == 8
    assert ranks_of(0, 8, sequence_size=4).loss_factor == 8


def test_places_that_do_not_exist_are_refused() -> None:
    """A rank outside of its size, and a world that groups do not divide."""
    with pytest.raises(ValueError, match="data rank 2 of 2"):
        Ranks(2, 2)
    with pytest.raises(ValueError, match="sequence rank 1 of 1"):
        Ranks(0, 1, 1, 1)
    with pytest.raises(ValueError, match="6 ranks cannot be divided into groups of 4"):
        ranks_of(0, 6, sequence_size=4)


LISTEN_FAILED = "The server socket has failed to listen on any local network address. port: 29500, code: -98"
SERVER_LOST = "Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?"


@pytest.mark.parametrize(("said", "expected"), [(LISTEN_FAILED, UserError), (SERVER_LOST, DistNetworkError)])
def test_a_rank_that_is_lost_at_the_start_is_no_fault_of_the_port(
    said: str, expected: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bad input is never started again by Slurm; a rank that was killed is."""

    def refuse(**_: object) -> None:
        raise DistNetworkError(said)

    monkeypatch.setattr(deepspeed, "init_distributed", refuse)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    for name, value in zip(names, ("1", "1", "2", "127.0.0.1", "29500"), strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(expected, match=re.escape(said[:30])):
        init_distributed(1.0)
