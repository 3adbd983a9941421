"""Micro-batches: every sequence on one rank, once, within the token limit, laid side by side."""

import json
import math
import os
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from balance import imbalance
from hypothesis import given, settings
from hypothesis import strategies as st
from lengths import of_lengths, of_units
from packed import packed_origins
from toy import toy_step

from uft_ds.data.bins import fewest_micro_steps
from uft_ds.data.example import Kind, Response, Sequence
from uft_ds.data.micro_batch import micro_batch
from uft_ds.data.mixture import Step
from uft_ds.data.packing import Packing, pack, rank_micro_batches

WORLD_SIZES = (1, 2, 3, 4, 8)


# ---- which sequences share a micro-batch


def check_packed(
    step: Step, tokens_per_micro_batch: int, world_size: int, attention_parity: float = math.inf
) -> list[list[list[Sequence]]]:
    packed = pack(
        step,
        tokens_per_micro_batch=tokens_per_micro_batch,
        world_size=world_size,
        packing=Packing(attention_parity),
    )
    assert len(packed) == world_size
    assert len({len(micro_steps) for micro_steps in packed}) == 1
    placed = [id(sequence) for rank in packed for bin_ in rank for sequence in bin_]
    assert sorted(placed) == sorted(id(sequence) for sequence in step.sequences)
    for rank in packed:
        for bin_ in rank:
            assert sum(sequence.num_tokens for sequence in bin_) <= tokens_per_micro_batch
    return packed


@given(
    units=st.lists(st.lists(st.integers(2, 64), min_size=1, max_size=2).map(tuple), max_size=40),
    capacity=st.integers(128, 300),
    world_size=st.sampled_from(WORLD_SIZES),
    attention_parity=st.sampled_from([math.inf, 50.0]),
)
@settings(max_examples=100, deadline=None)
def test_any_step_is_divided(
    units: list[tuple[int, ...]], capacity: int, world_size: int, attention_parity: float
) -> None:
    """Every sequence once, no micro-batch above its limit, as many micro-steps on each rank, pairs whole."""
    packed = check_packed(of_units(units), capacity, world_size, attention_parity)
    pairs = [pair for rank in packed for bin_ in rank for pair in _pairs_of(bin_)]
    assert sorted(pairs) == sorted((f"{i}a", f"{i}b") for i, unit in enumerate(units) if len(unit) == 2)
    assert len(packed[0]) >= fewest_micro_steps([sum(unit) for unit in units], capacity, world_size)


@given(
    prompts=st.lists(
        st.tuples(st.integers(1, 40), st.lists(st.integers(1, 30), min_size=1, max_size=6)), min_size=1, max_size=12
    ),
    is_pair=st.booleans(),
    capacity=st.integers(140, 400),
    world_size=st.sampled_from(WORLD_SIZES),
)
@settings(max_examples=100, deadline=None)
def test_a_step_with_shared_prompts_is_divided(
    prompts: list[tuple[int, list[int]]], is_pair: bool, capacity: int, world_size: int
) -> None:
    """Every sequence once, pairs whole, no row above its limit with each prompt once, no more rows than without."""
    step = of_prompts(prompts, in_pairs=is_pair)
    options = {"tokens_per_micro_batch": capacity, "world_size": world_size}
    packed = pack(step, **options, packing=Packing(50.0, share_prompts=True))
    bins = [bin_ for rank in packed for bin_ in rank]
    assert sorted(id(sequence) for bin_ in bins for sequence in bin_) == sorted(map(id, step.sequences))
    assert len({len(micro_steps) for micro_steps in packed}) == 1
    pairs = {r.pair_id for r in step.responses if r.pair_id is not None}
    assert sum(len(micro_batch(bin_).pairs) for bin_ in bins) == len(pairs)
    rows = [micro_batch(bin_, share_prompts=True) for bin_ in bins if bin_]
    assert max(len(row.token_ids_T) for row in rows) <= capacity
    assert len(packed[0]) <= len(pack(step, **options, packing=Packing(50.0))[0]) + 1


def test_answers_to_one_prompt_share_a_row() -> None:
    """As many as a rank's part of the step holds: not all on one rank, where another would have nothing to do."""
    step = of_prompts([(50, [10, 10, 10, 10]), (50, [10, 10, 10, 10]), (5, [80])])
    (one,) = pack(step, tokens_per_micro_batch=500, world_size=1, packing=Packing(share_prompts=True))
    assert [len(micro_batch(bin_, share_prompts=True).token_ids_T) for bin_ in one] == [50 + 40 + 50 + 40 + 85]
    single = of_prompts([(50, [10, 10, 10, 10])])
    ranks = pack(single, tokens_per_micro_batch=500, world_size=2, packing=Packing(share_prompts=True))
    assert [len(bin_) for rank in ranks for bin_ in rank] == [2, 2] or [
        len(bin_) for rank in ranks for bin_ in rank
    ] == [3, 1]


def of_prompts(prompts: list[tuple[int, list[int]]], *, in_pairs: bool = False) -> Step:
    """Sequences with prompts and answers of these lengths; the first two answers to a prompt may be a pair."""
    sequences = []
    for number, (length, answers) in enumerate(prompts):
        prompt = np.full(length, number, dtype=np.int32)
        for place, own in enumerate(answers):
            tokens = np.concatenate([prompt, np.full(own, 1000 + place, dtype=np.int32)])
            pair_id = number if in_pairs and len(answers) > 1 and place < 2 else None
            kind: Kind = "score" if pair_id is None else "pair"
            response = Response(length, length + own, 0.5, kind, f"{number}.{place}", pair_id)
            sequences.append(Sequence(tokens, (response,)))
    return Step(0, tuple(sequences))


def _pairs_of(bin_: list[Sequence]) -> list[tuple[str, str]]:
    batch = micro_batch(bin_)
    return [(batch.responses[i].origin, batch.responses[j].origin) for i, j in batch.pairs]


@given(
    seed=st.integers(0, 10**6),
    count=st.integers(1, 80),
    capacity=st.integers(64, 4096),
    longest=st.sampled_from([0.5, 1.0]),
    world_size=st.sampled_from(WORLD_SIZES),
)
@settings(max_examples=150, deadline=None)
def test_at_most_one_micro_step_above_the_bound(
    seed: int, count: int, capacity: int, longest: float, world_size: int
) -> None:
    """Random lengths up to half a micro-batch and up to a whole one: the bound itself, or one more."""
    lengths = np.random.default_rng(seed).integers(2, int(longest * capacity) + 1, size=count).tolist()
    micro_steps = len(check_packed(of_lengths(lengths), capacity, world_size)[0])
    assert 0 <= micro_steps - fewest_micro_steps(lengths, capacity, world_size) <= 1


@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=7), capacity=st.integers(12, 20))
@settings(max_examples=150, deadline=None)
def test_the_bound_is_one(lengths: list[int], capacity: int) -> None:
    """Never above the fewest bins that a search through all divisions finds; never below total / capacity."""
    bound = fewest_micro_steps(lengths, capacity, 1)
    assert -(-sum(lengths) // capacity) <= bound <= fewest_bins_by_search(tuple(lengths), capacity)


def fewest_bins_by_search(lengths: tuple[int, ...], capacity: int) -> int:
    """The first with each set of others that fits beside it, then the rest in the same way."""
    if not lengths:
        return 0
    first, others = lengths[0], range(1, len(lengths))
    best = len(lengths)
    for size in range(len(lengths)):
        for beside in combinations(others, size):
            if first + sum(lengths[i] for i in beside) <= capacity:
                rest = tuple(lengths[i] for i in others if i not in beside)
                best = min(best, 1 + fewest_bins_by_search(rest, capacity))
    return best


@pytest.mark.parametrize(
    ("lengths", "world_size", "expected"),
    [
        ([], 4, 1),  # dummies
        ([5, 5], 1, 1),
        ([5, 5, 1], 1, 2),  # 11 tokens of 10
        ([6, 6, 6], 1, 3),  # L2: above half, so one each, though 18 tokens would be 2 bins
        ([7, 7, 4], 1, 3),  # L2: the 4 fits beside no 7, though 18 tokens would be 2 bins
        ([9, 9, 2], 1, 3),  # L2: nor the 2 beside a 9
        ([34] * 6, 1, 3),  # capacity 100: 204 tokens would be 3
        ([34] * 30, 1, 15),  # 1020 tokens would be 11 bins; above a third, so two to a bin
        ([26] * 30, 1, 10),  # 780 tokens would be 8 bins; above a quarter, so three to a bin
        ([60] * 5, 4, 2),  # five bins on four ranks
    ],
)
def test_bounds_by_hand(lengths: list[int], world_size: int, expected: int) -> None:
    """In micro-batches of 10 tokens, or of 100 where lengths have two digits."""
    capacity = 100 if max(lengths, default=0) > 10 else 10
    assert fewest_micro_steps(lengths, capacity, world_size) == expected


def test_a_tight_step_is_filled_exactly() -> None:
    """Three micro-batches of 100 without a token to spare, where longest first and best fit both need a fourth."""
    lengths = [13, 9, 68, 10, 31, 35, 20, 14, 9, 29, 50, 12]
    assert sum(lengths) == 300
    assert len(check_packed(of_lengths(lengths), 100, 1)[0]) == 3


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


def test_packing_is_the_same_in_each_process() -> None:
    """Every rank computes the packing of all: Python's hash seed, which differs between processes, is no input."""
    other = subprocess.run(
        [sys.executable, "-c", "import packed; print(packed.packed_origins(), end='')"],
        env=os.environ | {"PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert other.stdout.count("89a") == 2
    assert other.stdout == packed_origins()


def test_an_empty_step_is_one_dummy_a_rank() -> None:
    """Even a step of nothing keeps the ranks together."""
    assert pack(Step(0, ()), tokens_per_micro_batch=8, world_size=2) == [[[]], [[]]]


def test_a_sequence_above_the_limit_is_refused() -> None:
    """It can never fit; the message gives both numbers."""
    with pytest.raises(ValueError, match="a sequence of 9 tokens exceeds tokens_per_micro_batch 8"):
        pack(of_lengths([3, 9]), tokens_per_micro_batch=8, world_size=2)


def test_a_pair_above_the_limit_is_refused() -> None:
    """Each side would fit, but they are not parted."""
    with pytest.raises(ValueError, match="a pair of 9 tokens exceeds tokens_per_micro_batch 8"):
        pack(of_units([(3,), (5, 4)]), tokens_per_micro_batch=8, world_size=2)


# ---- balance


def test_imbalance_by_hand() -> None:
    """Two ranks, two micro-steps: (6, 2) and (2, 4) tokens; totals 8 and 6 of 7, waiting (6 + 4) / 7 - 1 = 3/7.

    With attention equal at 2 tokens a sequence costs T + T^2 / 2, so 24, 4 and 4, 12: totals 28 and 16 of 22, and
    (24 + 12) / 22 - 1 = 7/11.
    """
    six, two, also_two, four = ([sequence] for sequence in of_lengths([6, 2, 2, 4]).sequences)
    packed = [[six, two], [also_two, four]]
    assert imbalance(packed) == pytest.approx((1 / 7, 3 / 7))
    assert imbalance(packed, 2.0) == pytest.approx((3 / 11, 7 / 11))
    assert imbalance([[[]], [[]]]) == (0.0, 0.0)


def test_attention_counts_as_the_parity_says() -> None:
    """Lengths 8, 4, 4, 4, 4 on two ranks. By tokens 8 + 4 against 4 + 4 + 4: 12 each.

    With parity 2 the 8 costs 8 + 32 = 40 and a 4 costs 4 + 8 = 12: 40 against 48, better than 52 against 36.
    """
    step = of_lengths([8, 4, 4, 4, 4])

    def found(parity: float) -> list[list[int]]:
        packed = check_packed(step, 100, 2, parity)
        return sorted(sorted(s.num_tokens for s in rank[0]) for rank in packed)

    assert found(math.inf) == [[4, 4, 4], [4, 8]]
    assert found(2.0) == [[4, 4, 4, 4], [8]]


def test_long_sequences_meet_in_a_micro_step() -> None:
    """Two of 8 and four of 4 on two ranks, nothing fits beside an 8: both at once, so that nobody waits."""
    packed = check_packed(of_lengths([8, 4, 4, 8, 4, 4]), 8, 2)
    assert [[sorted(s.num_tokens for s in bin_) for bin_ in rank] for rank in packed] == [[[8], [4, 4]]] * 2


def test_beside_a_long_sequence_the_others_get_as_much() -> None:
    """One of 40 and eight of 10 on two ranks, two micro-steps: 40 beside 40, then 20 and 20.

    The mean of the four micro-batches, 30, would leave one rank waiting for the 40. With four of 10 more it is 40.
    """
    for tens, second in ((8, 20), (12, 40)):
        packed = check_packed(of_lengths([40] + [10] * tens), 45, 2)
        assert [sum(s.num_tokens for s in bin_) for rank in packed for bin_ in rank] == [40, second] * 2
        assert imbalance(packed) == (0.0, 0.0)


def real_units(test_data: Path) -> list[tuple[int, ...]]:
    """Lengths of real rows, a quarter of their characters for tokens: instructions, conversations and pairs."""

    def rows(name: str) -> list[dict]:
        text = (test_data / name).read_text(encoding="utf-8")
        return json.loads(text) if name.endswith(".json") else [json.loads(line) for line in text.splitlines()]

    units: list[tuple[int, ...]] = []
    for row in rows("llama_factory/alpaca_en_demo.json"):
        units.append((len(row["instruction"] + row["input"] + row["output"]),))
    for row in rows("llama_factory/kto_en_demo.json"):
        units.append((sum(len(message["content"]) for message in row["messages"]),))
    for row in rows("llama_factory/dpo_en_demo.json"):
        prompt = sum(len(turn["value"]) for turn in row["conversations"])
        units.append((prompt + len(row["chosen"]["value"]), prompt + len(row["rejected"]["value"])))
    for row in rows("ultrafeedback/train_clean.jsonl"):
        units.append((len(row["prompt"] + row["chosen"]), len(row["prompt"] + row["rejected"])))
    return [tuple(max(2, characters // 4) for characters in unit) for unit in units]


@pytest.mark.parametrize("world_size", [1, 2, 8, 64])
@pytest.mark.parametrize("capacity", [4096, 8192, 16384])
def test_real_steps_are_even_and_few(test_data: Path, world_size: int, capacity: int) -> None:
    """Sixteen and more units a rank: totals and waiting within 1%, at most one micro-step above the bound.

    Measured over these and other seeds: 0.2% at most, and the bound itself in 2996 of 3000 steps.
    """
    fitting = [unit for unit in real_units(test_data) if sum(unit) <= capacity]
    for seed, per_rank in ((0, 16), (1, 32)):
        chosen = np.random.default_rng(seed).integers(len(fitting), size=per_rank * world_size)
        units = [fitting[i] for i in chosen]
        packed = check_packed(of_units(units), capacity, world_size)
        assert max(imbalance(packed)) <= 0.01
        bound = fewest_micro_steps([sum(unit) for unit in units], capacity, world_size)
        assert bound <= len(packed[0]) <= bound + 1


def test_real_steps_are_even_in_attention_too(test_data: Path) -> None:
    """A parity of 16000 tokens (a model of 0.5 billion), 8 ranks: within 3%, and far below what tokens alone give."""
    fitting = [unit for unit in real_units(test_data) if sum(unit) <= 8192]
    step = of_units([fitting[i] for i in np.random.default_rng(2).integers(len(fitting), size=128)])
    aware = imbalance(check_packed(step, 8192, 8, 16000.0), 16000.0)
    unaware = imbalance(check_packed(step, 8192, 8), 16000.0)
    assert max(aware) <= 0.03
    assert max(aware) < 0.3 * max(unaware)
