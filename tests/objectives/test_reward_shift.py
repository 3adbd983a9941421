"""What is subtracted from the rewards: running means, mismatched responses, means over a prompt; all by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq

import numpy as np
import pytest

from uft_ds.data.example import Response, Sequence
from uft_ds.data.micro_batch import micro_batch
from uft_ds.objectives.reward_shift import (
    RewardShift,
    kl_shift,
    mismatched,
    next_running_mean,
    prompt_of,
    repeated_prompts,
)


def sequence(tokens: list[int], *spans: tuple[int, int]) -> Sequence:
    """Tokens, and a scored response for each span."""
    responses = tuple(Response(start, end, 0.5, "score", f"row:{start}") for start, end in spans)
    return Sequence(np.array(tokens, dtype=np.int32), responses)


def spans_of(*sequences: Sequence) -> list[tuple[Sequence, Response]]:
    return [(one, response) for one in sequences for response in one.responses]


# ---- numbers


def test_the_shift_is_off_by_default() -> None:
    """The paper's f = c = 0; BCO's mean forgets a tenth a step."""
    assert RewardShift() == RewardShift("none", 0.0, 0.9)


def test_the_running_mean_by_hand() -> None:
    """Decay 0.9 from 0 with step means of 1, 1, -2: 0.1, 0.19, -0.029."""
    shift, found = 0.0, []
    for step_mean in (1.0, 1.0, -2.0):
        shift = next_running_mean(shift, step_mean, 0.9)
        found.append(shift)
    assert found == pytest.approx([0.1, 0.19, -0.029])
    assert next_running_mean(5.0, 1.0, 0.0) == 1.0, "decay 0: the last step alone"
    assert next_running_mean(5.0, 1.0, 1.0) == 5.0, "decay 1: never moved"


@pytest.mark.parametrize(
    ("rewards", "shift"), [([0.5, 1.5], 1.0), ([2.0, -1.0, 0.5], 0.5), ([-3.0, 1.0], 0.0), ([0.0], 0.0), ([], 0.0)]
)
def test_the_kl_shift_is_a_mean_that_is_not_negative(rewards: list[float], shift: float) -> None:
    """KL is not negative, its estimate may be: the mean, clamped as a whole, not reward by reward."""
    assert kl_shift(rewards) == shift


def test_a_reward_that_is_no_number_is_no_shift_of_zero() -> None:
    """NaN stays NaN: a step that went wrong must be seen and skipped."""
    assert math.isnan(kl_shift([float("nan"), 1.0]))


# ---- mismatched prompts and responses


def tokens_of(sequences: Seq[Sequence]) -> list[list[int]]:
    return [one.token_ids_T.tolist() for one in sequences]


def test_mismatched_tokens_by_hand() -> None:
    """Each prompt with the next one's response, the last one with the first: nothing of its own response."""
    first, second = sequence([1, 2, 10, 11, 12], (2, 5)), sequence([3, 20, 21, 22], (1, 4))
    third = sequence([4, 5, 30], (2, 3))
    found = mismatched(spans_of(first, second, third))
    assert tokens_of(found) == [[1, 2, 20, 21, 22], [3, 30], [4, 5, 10, 11, 12]]
    assert [(r.start, r.end) for one in found for r in one.responses] == [(2, 5), (1, 2), (2, 5)]
    assert all(one.token_ids_T.dtype == np.int32 for one in found)


def test_mismatched_sequences_can_be_forwarded() -> None:
    """One response each, of the kind and the origin of the one that was put there, and no side of a pair."""
    chosen = Response(1, 3, 1.0, "pair", "a:1", pair_id=4)
    scored = Response(2, 3, 0.3, "score", "b:1")
    left = Sequence(np.array([1, 2, 3], dtype=np.int32), (chosen,))
    right = Sequence(np.array([5, 6, 7, 8], dtype=np.int32), (scored,))
    found = mismatched([(left, chosen), (right, scored)])
    assert [(r.kind, r.origin, r.score, r.pair_id) for one in found for r in one.responses] == [
        ("score", "b:1", 0.3, None),
        ("pair", "a:1", 1.0, None),
    ]
    batch = micro_batch(found)
    assert batch.targets_N.tolist() == [7, 2, 3]
    assert batch.pairs == ()


def test_a_mismatched_response_keeps_its_facts() -> None:
    """What a response carries besides its score goes with it."""
    scored = Response(1, 2, 0.3, "score", "b:1", other_facts={"advantage": 2.0})
    left, right = sequence([1, 10], (1, 2)), Sequence(np.array([5, 6], dtype=np.int32), (scored,))
    found = mismatched([(left, left.responses[0]), (right, scored)])
    assert found[0].responses[0].facts == {"score": 0.3, "advantage": 2.0}


def test_an_answer_to_the_same_prompt_is_no_mismatch() -> None:
    """Both sides of a pair meet the response of the next prompt, and it the first of theirs."""
    chosen, rejected, other = sequence([1, 10], (1, 2)), sequence([1, 11], (1, 2)), sequence([2, 20], (1, 2))
    assert tokens_of(mismatched(spans_of(chosen, rejected, other))) == [[1, 20], [1, 20], [2, 10]]
    assert tokens_of(mismatched(spans_of(chosen, other, rejected))) == [[1, 20], [2, 11], [1, 20]]
    assert mismatched(spans_of(chosen, rejected)) == (), "nothing answers another prompt"


def test_answers_that_are_drawn_together_are_each_a_mismatch_once() -> None:
    """Four prompts, each with a good answer and then a bad one: not the good one of the next prompt for both."""
    answers = [
        sequence([prompt, answer], (1, 2)) for prompt in (1, 2, 3, 4) for answer in (10 * prompt, 10 * prompt + 1)
    ]
    tokens = tokens_of(mismatched(spans_of(*answers)))
    assert tokens == [[1, 20], [1, 21], [2, 30], [2, 31], [3, 40], [3, 41], [4, 10], [4, 11]]


def test_a_conversations_own_turns_are_no_mismatch() -> None:
    """A later turn answers the prompt before it, too: each turn meets the other conversation, its prompt the first."""
    talk, other = sequence([1, 10, 2, 11], (1, 2), (3, 4)), sequence([8, 80], (1, 2))
    found = mismatched(spans_of(talk, other))
    assert tokens_of(found) == [[1, 80], [1, 10, 2, 80], [8, 10]]
    assert mismatched(spans_of(talk)) == ()


def test_what_would_be_longer_than_all_is_left_out() -> None:
    """Joined lengths of 5 and 3 where the longest sequence is of 4: the first is left out, others do not move up."""
    long_prompt, long_answer = sequence([1, 2, 3, 10], (3, 4)), sequence([4, 5, 20, 21], (2, 4))
    assert tokens_of(mismatched(spans_of(long_prompt, long_answer))) == [[4, 5, 10]]
    longer = sequence([6, 7, 8, 9, 30], (4, 5))
    assert tokens_of(mismatched(spans_of(long_prompt, long_answer, longer)))[0] == [1, 2, 3, 20, 21]


def test_fewer_than_two_responses_mismatch_nothing() -> None:
    """A response behind its own prompt is no mismatch."""
    assert mismatched([]) == ()
    assert mismatched(spans_of(sequence([1, 10], (1, 2)))) == ()


# ---- means over a prompt


def test_a_prompt_is_all_before_the_response() -> None:
    """Two answers to one prompt share it; another token, a missing one, or a turn before make another."""
    one, two = sequence([1, 2, 10, 11], (2, 4)), sequence([1, 2, 20], (2, 3))
    others = sequence([1, 3, 10, 11], (2, 4)), sequence([2, 10, 11], (1, 3)), sequence([1, 2, 10, 11], (3, 4))
    names = [prompt_of(of, response) for of, response in spans_of(one, two, *others)]
    assert names[0] == names[1]
    assert len(set(names)) == 4


def test_prompts_of_a_conversation_differ_by_turn() -> None:
    """The same user turn after different answers is not the same prompt."""
    first = sequence([1, 10, 2, 11], (1, 2), (3, 4))
    second = sequence([1, 20, 2, 11], (1, 2), (3, 4))
    names = [prompt_of(of, response) for of, response in spans_of(first, second)]
    assert names[0] == names[2]
    assert names[1] != names[3]


def test_a_prompt_is_repeated_by_another_answer() -> None:
    """Two answers to a; b once; c twice with one answer, its own mean; d thrice, with two answers."""
    prompts = [b"a", b"b", b"c", b"a", b"c", b"d", b"d", b"d"]
    assert repeated_prompts(prompts, [1, 2, 3, 4, 3, 5, 5, 6]) == {b"a", b"d"}
    assert repeated_prompts([], []) == set()
