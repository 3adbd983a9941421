"""Micro-batches: every sequence on one rank, once, within the token limit, laid side by side."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import toy_sequences, toy_step

from uft_ds.data.example import Response, Sequence
from uft_ds.data.mixture import Step
from uft_ds.data.packing import MicroBatch, micro_batch, pack, rank_micro_batches

WORLD_SIZES = (1, 2, 3, 4, 8)


def of_lengths(lengths: list[int]) -> Step:
    """Sequences of these lengths whose last token is a response named by its number."""
    return Step(
        0,
        tuple(
            Sequence(np.arange(length, dtype=np.int32), (Response(length - 1, length, 0.5, "score", str(i)),))
            for i, length in enumerate(lengths)
        ),
    )


def test_layout_by_hand() -> None:
    """Two sequences of 5 and 3 tokens: the second's responses shift by 5, each token is predicted from before it."""
    first = Sequence(
        np.array([10, 11, 12, 13, 14], dtype=np.int32),
        (Response(1, 2, 0.25, "instruction", "a"), Response(3, 5, 1.0, "instruction", "b")),
    )
    second = Sequence(np.array([20, 21, 22], dtype=np.int32), (Response(2, 3, 0.0, "score", "c"),))
    batch = micro_batch([first, second])
    assert batch.token_ids_T.tolist() == [10, 11, 12, 13, 14, 20, 21, 22]
    assert batch.position_ids_T.tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert batch.targets_N.tolist() == [11, 13, 14, 22]
    assert batch.predictors_N.tolist() == [0, 2, 3, 6]
    assert batch.response_of_N.tolist() == [0, 1, 1, 2]
    assert batch.scores_R.tolist() == [0.25, 1.0, 0.0]
    assert batch.bounds_S.tolist() == [0, 5, 8]
    assert batch.longest == 5
    assert [response.origin for response in batch.responses] == ["a", "b", "c"]
    indices = ("token_ids_T", "position_ids_T", "predictors_N", "targets_N", "response_of_N")
    assert {getattr(batch, name).dtype for name in indices} == {torch.int64}
    assert (batch.scores_R.dtype, batch.bounds_S.dtype) == (torch.float32, torch.int32)


@given(count=st.integers(1, 9), seed=st.integers(0, 999))
@settings(deadline=None)
def test_layout_of_any_sequences(count: int, seed: int) -> None:
    """Each response's targets are its own tokens, each predicted by the token before it in the same sequence."""
    sequences = toy_sequences(count, seed=seed)
    batch = micro_batch(sequences)
    bounds = batch.bounds_S.tolist()
    assert bounds[-1] == len(batch.token_ids_T) == len(batch.position_ids_T)
    assert batch.longest == max(end - start for start, end in pairwise(bounds))
    number = 0
    for sequence, (start, end) in zip(sequences, pairwise(bounds), strict=True):
        assert batch.token_ids_T[start:end].tolist() == sequence.token_ids_T.tolist()
        assert batch.position_ids_T[start:end].tolist() == list(range(end - start))
        for response in sequence.responses:
            own = batch.response_of_N == number
            assert batch.targets_N[own].tolist() == sequence.token_ids_T[response.start : response.end].tolist()
            predictors = batch.predictors_N[own]
            assert predictors.tolist() == list(range(start + response.start - 1, start + response.end - 1))
            assert start <= int(predictors[0])
            assert batch.responses[number] == response
            assert batch.scores_R[number] == np.float32(response.score)
            number += 1
    assert number == len(batch.responses) == len(batch.scores_R)


def test_no_sequences_make_the_dummy() -> None:
    """A rank with nothing left forwards two tokens and no response, with empty tensors of the usual types."""
    dummy, real = micro_batch([]), micro_batch(toy_sequences(1))
    assert dummy.token_ids_T.tolist() == [0, 0]
    assert dummy.position_ids_T.tolist() == [0, 1]
    assert dummy.bounds_S.tolist() == [0, 2]
    assert (dummy.longest, dummy.responses) == (2, ())
    for name in ("predictors_N", "targets_N", "response_of_N", "scores_R"):
        assert getattr(dummy, name).shape == (0,)
        assert getattr(dummy, name).dtype == getattr(real, name).dtype


def test_to_moves_every_tensor() -> None:
    """No tensor stays behind; what is no tensor stays as it is."""
    batch = micro_batch(toy_sequences(2))
    moved = batch.to("meta")
    tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 7
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert (moved.longest, moved.responses) == (batch.longest, batch.responses)


def check_packed(step: Step, tokens_per_micro_batch: int, world_size: int) -> list[list[list[Sequence]]]:
    packed = pack(step, tokens_per_micro_batch=tokens_per_micro_batch, world_size=world_size)
    assert len(packed) == world_size
    assert len({len(micro_steps) for micro_steps in packed}) == 1
    placed = [id(sequence) for rank in packed for bin_ in rank for sequence in bin_]
    assert sorted(placed) == sorted(id(sequence) for sequence in step.sequences)
    for rank in packed:
        for bin_ in rank:
            assert sum(sequence.num_tokens for sequence in bin_) <= tokens_per_micro_batch
    return packed


@given(
    lengths=st.lists(st.integers(2, 64), max_size=40),
    capacity=st.integers(64, 200),
    world_size=st.sampled_from(WORLD_SIZES),
)
@settings(max_examples=200, deadline=None)
def test_any_step_is_divided(lengths: list[int], capacity: int, world_size: int) -> None:
    """Every sequence once, no micro-batch above its limit, as many micro-steps on each rank, few of them."""
    packed = check_packed(of_lengths(lengths), capacity, world_size)
    micro_steps = len(packed[0])
    fewest = max(1, -(-sum(lengths) // (capacity * world_size)))
    assert fewest <= micro_steps <= max(1, len(lengths))
    # A sequence of at most 64 tokens is refused only when the lightest bin holds more than capacity - 64.
    enough = max(1, -(-sum(lengths) // (max(1, capacity - 63) * world_size)))
    assert micro_steps <= enough


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_every_sequence_once_for_any_world_size(world_size: int) -> None:
    """The step's responses are the same, however many ranks share them (invariant 2)."""
    step = toy_step(23)
    batches = [
        batch
        for rank in range(world_size)
        for batch in rank_micro_batches(step, tokens_per_micro_batch=100, rank=rank, world_size=world_size)
    ]
    key = [(r.origin, r.score) for batch in batches for r in batch.responses]
    assert sorted(key) == sorted((r.origin, r.score) for r in step.responses)
    assert all(len(batch.token_ids_T) <= 100 for batch in batches)


def test_ranks_have_equal_work() -> None:
    """Thirty-two sequences of 2 to 33 tokens on four ranks: each gets a quarter of the 560 tokens, give or take 3."""
    packed = check_packed(of_lengths(list(range(2, 34))), 1000, 4)
    loads = [sum(sequence.num_tokens for bin_ in rank for sequence in bin_) for rank in packed]
    assert sum(loads) == 560
    assert all(abs(load - 140) <= 3 for load in loads)


def test_ranks_without_work_get_the_dummy() -> None:
    """One sequence on three ranks: the other two forward a dummy, once."""
    step = of_lengths([5])
    batches = [rank_micro_batches(step, tokens_per_micro_batch=8, rank=rank, world_size=3) for rank in range(3)]
    assert [len(rank) for rank in batches] == [1, 1, 1]
    assert [len(rank[0].responses) for rank in batches] == [1, 0, 0]


def test_a_sequence_may_fill_a_micro_batch() -> None:
    """The limit itself fits; three full sequences on two ranks need two micro-steps, one of them half empty."""
    packed = check_packed(of_lengths([8, 8, 8]), 8, 2)
    assert sorted(len(bin_) for rank in packed for bin_ in rank) == [0, 1, 1, 1]


def test_one_more_micro_step_where_the_tokens_do_not_divide() -> None:
    """Three times 6 tokens are 18, yet two micro-batches of 10 cannot hold them: three micro-steps, not four."""
    assert len(check_packed(of_lengths([6, 6, 6]), 10, 1)[0]) == 3


def test_the_last_micro_step_is_shared() -> None:
    """Five full sequences on four ranks: one rank runs two, the others one and a dummy."""
    packed = check_packed(of_lengths([8] * 5), 8, 4)
    assert [[len(bin_) for bin_ in rank] for rank in packed] == [[1, 1], [1, 0], [1, 0], [1, 0]]


def test_packing_is_repeatable() -> None:
    """Every rank computes the packing of all: it must come out the same in each process."""
    step = toy_step(23)
    first, again = (pack(step, tokens_per_micro_batch=100, world_size=3) for _ in range(2))
    assert [[[s.responses[0].origin for s in b] for b in r] for r in first] == [
        [[s.responses[0].origin for s in b] for b in r] for r in again
    ]


def test_an_empty_step_is_one_dummy_a_rank() -> None:
    """Even a step of nothing keeps the ranks together."""
    assert pack(Step(0, ()), tokens_per_micro_batch=8, world_size=2) == [[[]], [[]]]


def test_a_sequence_above_the_limit_is_refused() -> None:
    """It can never fit; the message gives both numbers."""
    with pytest.raises(ValueError, match="a sequence of 9 tokens exceeds tokens_per_micro_batch 8"):
        pack(of_lengths([3, 9]), tokens_per_micro_batch=8, world_size=2)


def test_a_micro_batch_is_immutable() -> None:
    """Nothing downstream may change what was packed."""
    batch: MicroBatch = micro_batch(toy_sequences(1))
    with pytest.raises(AttributeError):
        batch.longest = 3  # type: ignore[misc]
