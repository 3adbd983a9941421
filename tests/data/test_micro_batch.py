"""A micro-batch: the layout of sequences laid side by side, and what is known of their responses."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lengths import of_units
from toy import toy_sequences

from uft_ds.data.example import Response, Sequence
from uft_ds.data.micro_batch import MicroBatch, micro_batch


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


def test_layout_of_a_shared_prompt_by_hand() -> None:
    """Two sequences begin with 1 2 3, another stands between them: its place is kept among the responses alone."""

    def after(prompt: list[int], own: list[int], origin: str) -> Sequence:
        tokens = np.array(prompt + own, dtype=np.int32)
        return Sequence(tokens, (Response(len(prompt), len(tokens), 1.0, "score", origin),))

    rows = [after([1, 2, 3], [40, 41], "a"), after([7], [50], "b"), after([1, 2, 3], [60], "c")]
    batch = micro_batch(rows, share_prompts=True)
    assert batch.token_ids_T.tolist() == [1, 2, 3, 40, 41, 60, 7, 50]
    assert batch.position_ids_T.tolist() == [0, 1, 2, 3, 4, 3, 0, 1]
    assert (batch.lengths, batch.prompt_of) == ((3, 2, 1, 2), (None, 0, 0, None))
    assert batch.bounds_S.tolist() == [0, 3, 5, 6, 8]
    assert [response.origin for response in batch.responses] == ["a", "b", "c"]
    assert batch.targets_N.tolist() == [40, 41, 50, 60]
    assert batch.predictors_N.tolist() == [2, 3, 6, 2], "the last token of the prompt predicts both first tokens"
    assert batch.last_R.tolist() == [4, 7, 5]
    assert micro_batch(rows).prompt_of == (None, None, None)


@given(count=st.integers(1, 9), seed=st.integers(0, 999))
@settings(deadline=None)
def test_any_row_with_shared_prompts_holds_the_same_responses(count: int, seed: int) -> None:
    """Targets, their predictors' tokens and positions, and the responses are those of the row without sharing."""
    sequences = list(toy_sequences(count, seed=seed))
    sequences += [_with_other_end(sequence) for sequence in sequences[::2]]
    shared, plain = micro_batch(sequences, share_prompts=True), micro_batch(sequences)
    prompts = [sequence.prompt_tokens for sequence in sequences[:count:2]]
    assert len(shared.token_ids_T) == len(plain.token_ids_T) - sum(prompts)
    for values in ("token_ids_T", "position_ids_T"):
        of_shared, of_plain = (getattr(batch, values)[batch.predictors_N] for batch in (shared, plain))
        assert of_shared.tolist() == of_plain.tolist()
    for values in ("targets_N", "response_of_N"):
        assert getattr(shared, values).tolist() == getattr(plain, values).tolist()
    assert shared.token_ids_T[shared.last_R].tolist() == plain.token_ids_T[plain.last_R].tolist()
    assert shared.response_keys == plain.response_keys


def _with_other_end(sequence: Sequence) -> Sequence:
    tokens = sequence.token_ids_T.copy()
    tokens[sequence.prompt_tokens :] += 1
    return Sequence(tokens, sequence.responses)


def test_facts_are_columns_by_name() -> None:
    """A fact that one response lacks is no number there; one that none carries is no number anywhere."""
    responses = (Response(1, 2, 0.25, "score", other_facts={"advantage": -1.5}), Response(3, 5, 1.0, "instruction"))
    batch = micro_batch([Sequence(np.arange(5, dtype=np.int32), responses)])
    assert responses[0].facts == {"score": 0.25, "advantage": -1.5}
    assert {name: column.dtype for name, column in batch.facts.items()} == dict.fromkeys(
        ("score", "advantage"), torch.float32
    )
    assert batch.fact("score") is batch.scores_R
    assert batch.fact("advantage")[0] == -1.5
    assert batch.fact("advantage").isnan().tolist() == [False, True]
    assert batch.fact("value").isnan().tolist() == [True, True]
    assert micro_batch([]).fact("advantage").shape == (0,), "the dummy of a rank without responses has every column"
    moved = batch.to("meta")
    assert {column.device.type for column in moved.facts.values()} == {"meta"}
    assert set(moved.facts) == set(batch.facts)


def test_a_score_given_twice_is_refused() -> None:
    """Which of two scores counts is not guessed."""
    with pytest.raises(ValueError, match=r"score is given twice: 0\.25 and 0\.5"):
        Response(1, 2, 0.25, "score", other_facts={"score": 0.5})


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
    assert dummy.pairs == ()


def test_to_moves_every_tensor() -> None:
    """No tensor stays behind; what is no tensor stays as it is."""
    batch = micro_batch(toy_sequences(2))
    moved = batch.to("meta")
    tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 7
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert (moved.longest, moved.responses) == (batch.longest, batch.responses)


def test_pairs_are_found_by_their_id() -> None:
    """Chosen and rejected stand where their responses do, with other responses before and between them."""
    a, chosen, rejected, b, first, second = of_units([(4,), (5, 6), (3,), (7, 8)]).sequences
    batch = micro_batch([a, chosen, b, rejected, first, second])
    assert batch.pairs == ((1, 3), (4, 5))
    assert [[batch.responses[i].origin for i in pair] for pair in batch.pairs] == [
        ["1a", "1b"],
        ["3a", "3b"],
    ]


def test_a_side_alone_is_no_pair() -> None:
    """To forward one side for its log-prob is allowed; a third of the same id is a mistake of ours."""
    _, rejected = of_units([(5, 6)]).sequences
    assert micro_batch([rejected]).pairs == ()
    with pytest.raises(AssertionError, match="a pair_id names one pair"):
        micro_batch([rejected] * 3)


def test_a_micro_batch_is_immutable() -> None:
    """Nothing downstream may change what was packed."""
    batch: MicroBatch = micro_batch(toy_sequences(1))
    with pytest.raises(AttributeError):
        batch.longest = 3  # type: ignore[misc]
