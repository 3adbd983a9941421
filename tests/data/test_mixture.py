"""The order of the mixture: everything once an epoch, evenly spread, from data and seed alone."""

import time
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pools import Held, Mixed, plan

from uft_ds.data.example import Response, Sequence
from uft_ds.data.mixture import (
    Portion,
    Step,
    Steps,
    epoch_amounts,
    in_order,
    mixed_order,
    plan_steps,
    units_of_epochs,
)
from uft_ds.data.packing import pack
from uft_ds.data.source import StepSource
from uft_ds.errors import UserError

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=4)


def source(name: str, counts: list[int]) -> tuple[Sequence, ...]:
    """Sequences with so many responses each, named `name:i`."""
    return tuple(
        Sequence(
            np.zeros(2 * count, dtype=np.int32),
            tuple(Response(2 * r + 1, 2 * r + 2, 1.0, "instruction", f"{name}:{i}") for r in range(count)),
        )
        for i, count in enumerate(counts)
    )


def names(step: Step) -> list[str]:
    return [sequence.responses[0].origin for sequence in step.sequences]


def order_of(
    sizes: list[int] | tuple[int, ...], labels: list[str], seed: int = 0, epoch: int = 0
) -> list[tuple[int, int]]:
    """(source, unit) of an epoch that takes each source once; units of one response."""
    mixed = [Mixed(label, Held(source(label, [1] * n))) for label, n in zip(labels, sizes, strict=True)]
    return pairs_of(mixed_order(mixed, [float(size) for size in sizes], seed=seed, epoch=epoch))


def pairs_of(order: tuple[np.ndarray, np.ndarray]) -> list[tuple[int, int]]:
    return list(zip(order[0].tolist(), order[1].tolist(), strict=True))


def portions(*given: tuple[int, Portion]) -> list[Mixed]:
    """Sources of so many responses, with their portions."""
    return [Mixed(f"s{i}", Held(source(f"s{i}", [1] * n)), portion) for i, (n, portion) in enumerate(given)]


def counts_of(steps: Steps) -> Counter[str]:
    """How often each source was drawn from."""
    return Counter(name.split(":")[0] for step in steps for name in names(step))


def trained_on(step: Step, world_size: int) -> list[str]:
    """Origins of all sequences that the ranks are given, each as often as it is."""
    ranks = pack(step, tokens_per_micro_batch=16, world_size=world_size)
    assert len(ranks) == world_size
    return sorted(s.responses[0].origin for rank in ranks for micro_step in rank for s in micro_step)


@given(sizes=SIZES, seed=st.integers(0, 2**32), epoch=st.integers(0, 5))
def test_every_sequence_comes_once_an_epoch(sizes: list[int], seed: int, epoch: int) -> None:
    """The order of an epoch is a permutation of all sequences of all sources."""
    order = order_of(sizes, [str(i) for i in range(len(sizes))], seed, epoch)
    assert sorted(order) == [(s, i) for s, size in enumerate(sizes) for i in range(size)]


def test_the_order_changes_with_seed_and_epoch() -> None:
    """The same arguments give the same order, another seed or epoch another one."""
    first, again, seed, epoch = (order_of([30, 30], ["a", "b"], s, e) for s, e in ((1, 0), (1, 0), (2, 0), (1, 1)))
    assert first == again
    assert len({tuple(order) for order in (first, seed, epoch)}) == 3


def test_sources_of_one_label_are_shuffled_apart() -> None:
    """Two sources of the same file name do not come in the same order."""
    order = order_of([50, 50], ["a", "a"])
    assert [i for s, i in order if s == 0] != [i for s, i in order if s == 1]


@given(sizes=st.lists(st.integers(1, 30), min_size=2, max_size=4), more=st.integers(1, 50), seed=st.integers(0, 99))
def test_growing_a_source_leaves_the_others_order(sizes: list[int], more: int, seed: int) -> None:
    """With more rows in one source, or without it, all others keep their relative order."""
    labels = [str(i) for i in range(len(sizes))]
    orders = [
        [(labels[s], i) for s, i in order_of(changed, labels, seed) if s > 0]
        for changed in (sizes, [sizes[0] + more, *sizes[1:]])
    ]
    without = order_of(sizes[1:], labels[1:], seed)
    assert orders[0] == orders[1] == [(labels[s + 1], i) for s, i in without]


@pytest.mark.parametrize("sizes", [(400, 400), (900, 100), (1000, 7, 93)])
def test_sources_are_spread_evenly(sizes: tuple[int, ...]) -> None:
    """Between any two positions a source is off its share by at most about one sequence per source.

    The k-th of n stands in [k / n, (k + 1) / n): a stretch that covers a share f of the epoch holds f n +- 2 of it;
    the stretch's own length, counted in sequences, is uncertain by as much for every source.
    """
    order = order_of(sizes, [str(i) for i in range(len(sizes))], 3)
    quarter = len(order) // 4
    for start in range(0, 4 * quarter, quarter):
        counts = Counter(s for s, _ in order[start : start + quarter])
        for s, size in enumerate(sizes):
            assert abs(counts[s] - size / 4) <= 2 * len(sizes)


def test_a_source_is_shuffled_within() -> None:
    """Spreading is not the file's order: the first quarter of an epoch draws from all of a file."""
    first = [i for _, i in order_of([400], ["a"])][:100]
    assert first != sorted(first)
    assert all(any(low <= i < low + 100 for i in first) for low in range(0, 400, 100))


def test_responses_of_step_n_depend_on_recipe_data_seed_and_n_only() -> None:
    """Invariant 3: of each step the ranks together train on the same responses, each once, whether 1, 2 or 3 ranks
    divide it, whether a fresh process (a restart) asks for it first or after others, and however far the plan goes."""
    sources = [source("a", [1, 2, 3] * 5), source("b", [1] * 20)]
    longest = plan(*sources, steps=40)
    expected = [sorted(names(step)) for step in longest]
    assert len({tuple(of_step) for of_step in expected}) > 30  # else equal steps would show nothing
    for world_size in (1, 2, 3):
        in_order_asked = plan(*sources, steps=40)
        assert [trained_on(step, world_size) for step in in_order_asked] == expected
        for first in (39, 17, 3):
            restarted = plan(*sources, steps=40)
            assert [trained_on(restarted[n], world_size) for n in range(first, 40)] == expected[first:]
            assert trained_on(restarted[0], world_size) == expected[0]
    for steps in (1, 3, 17):
        assert [names(step) for step in plan(*sources, steps=steps)] == [names(step) for step in longest[:steps]]
    one_epoch = plan(*sources, epochs=1)
    assert [names(step) for step in one_epoch[:-1]] == [names(step) for step in longest[: len(one_epoch) - 1]]


def test_fixed_data_is_a_source_of_steps_without_a_state() -> None:
    """Step n by its number is the n-th of the sequence, and a restart needs nothing else."""
    steps: StepSource = plan(source("a", [1, 2, 3] * 5), steps=4)
    asked_last_first = [names(steps.step(n)) for n in reversed(range(len(steps)))]
    assert asked_last_first[::-1] == [names(step) for step in plan(source("a", [1, 2, 3] * 5), steps=4)]
    assert steps.state() == {}
    steps.restore(steps.state())


def test_fixed_data_refuses_the_state_of_another_source() -> None:
    """A checkpoint of generated steps cannot be gone on from with fixed data: the message names what was found."""
    with pytest.raises(UserError, match=r"state of another source of steps \(.*record"):
        plan(source("a", [1])).restore({"record": "rollouts.jsonl"})


@given(
    counts=st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=20), min_size=1, max_size=3),
    examples_per_step=st.integers(1, 12),
    epochs=st.integers(1, 3),
    seed=st.integers(0, 99),
)
@settings(deadline=None)
def test_steps_hold_what_is_asked_for(counts: list[list[int]], examples_per_step: int, epochs: int, seed: int) -> None:
    """At least examples_per_step responses in whole sequences, no sequence more than needed; the last has the rest."""
    sources = [source(str(i), c) for i, c in enumerate(counts)]
    steps = plan(*sources, examples_per_step=examples_per_step, epochs=epochs, seed=seed)
    assert [step.index for step in steps] == list(range(len(steps)))
    for step in steps[:-1]:
        assert len(step.responses) >= examples_per_step
    for step in steps:
        assert len(step.responses) - len(step.sequences[-1].responses) < examples_per_step
    everything = Counter(name for step in steps for name in names(step))
    assert everything == {f"{i}:{j}": epochs for i, c in enumerate(counts) for j in range(len(c))}


def test_the_last_step_holds_what_is_left() -> None:
    """Twenty responses in steps of eight: 8, 8 and 4."""
    assert [len(step.responses) for step in plan(source("a", [1] * 20))] == [8, 8, 4]


def test_steps_repeat_the_mixture() -> None:
    """Ten steps of eight from twenty: 80 responses are four epochs, each sequence once in each, in a new order."""
    steps = plan(source("a", [1] * 20), steps=10, epochs=1)
    assert [len(step.responses) for step in steps] == [8] * 10
    stream = [name for step in steps for name in names(step)]
    epochs = [stream[start : start + 20] for start in range(0, 80, 20)]
    assert all(sorted(epoch) == sorted(f"a:{i}" for i in range(20)) for epoch in epochs)
    assert all(one != other for one, other in pairwise(epochs))


def test_steps_may_be_fewer_than_an_epoch() -> None:
    """`steps` wins over `epochs`."""
    assert len(plan(source("a", [1] * 100), steps=2, epochs=3)) == 2


def test_a_sequence_of_many_responses_may_overfill_a_step() -> None:
    """Conversations are not torn: a step of eight with sequences of five holds ten."""
    assert [len(step.responses) for step in plan(source("a", [5] * 4))] == [10, 10]


def test_held_out_data_keeps_its_order() -> None:
    """Held-out groups are the file's order, so that a curve compares the same groups at each evaluation."""
    steps = in_order([Held(source("a", [1, 3, 2, 1]))], 4)
    assert [names(step) for step in steps] == [["a:0", "a:1"], ["a:2", "a:3"]]
    assert [step.index for step in steps] == [0, 1]
    assert len(in_order([], 4)) == len(in_order([Held(())], 4)) == 0


def test_a_step_is_made_without_its_predecessors() -> None:
    """Asked for alone, first, or backwards, a step is what it is in the whole plan: a resume replays nothing."""
    sources = [source("a", [1, 2, 3] * 5), source("b", [1] * 20)]
    whole = [names(step) for step in plan(*sources, steps=30)]
    for index in (29, 0, 17, -1):
        assert names(plan(*sources, steps=30)[index]) == whole[index]
    assert [names(step) for step in plan(*sources, steps=30)[5:8]] == whole[5:8]
    with pytest.raises(IndexError):
        plan(*sources, steps=30)[30]


def test_a_source_taken_two_and_a_half_times() -> None:
    """Twenty responses at 2.5 passes beside ten: 50 of 60 an epoch, none more than once more often than another."""
    mixed = portions((20, Portion(passes=2.5)), (10, Portion()))
    assert epoch_amounts(mixed) == [50.0, 10.0]
    steps = plan_steps(mixed, seed=0, examples_per_step=10, epochs=2, steps=None)
    assert counts_of(steps) == {"s0": 100, "s1": 20}
    drawn = Counter(name for step in steps[:6] for name in names(step) if name.startswith("s0"))
    assert sum(drawn.values()) == 50
    assert set(drawn.values()) == {2, 3}
    assert set(Counter(name for step in steps for name in names(step) if name.startswith("s0")).values()) == {5}


def test_a_share_is_of_the_whole() -> None:
    """A share of 0.25 beside 300 responses makes an epoch of 400, whatever the source has."""
    for size in (20, 100, 5000):
        mixed = portions((300, Portion()), (size, Portion(share=((0.0, 0.25),))))
        assert epoch_amounts(mixed) == [300.0, 100.0]
        assert counts_of(plan_steps(mixed, seed=0, examples_per_step=16, epochs=1, steps=None)) == {
            "s0": 300,
            "s1": 100,
        }


def test_shares_alone_end_with_the_first_source() -> None:
    """Shares of 0.8 and 0.2 over 100 and 100: when the first is through, 25 of the other have been taken."""
    mixed = portions((100, Portion(share=((0.0, 0.8),))), (100, Portion(share=((0.0, 0.2),))))
    assert epoch_amounts(mixed) == [100.0, 25.0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([(10, 0.5), (10, 0.4)], "the shares of all sources add up to 0.9, expected 1"),
        ([(10, None), (10, 0.7), (10, 0.3)], "shares of 1 in all leave nothing"),
    ],
)
def test_shares_that_make_no_whole_are_refused(given: list[tuple[int, float | None]], message: str) -> None:
    """All shares must add up to 1; beside sources without one they must leave something."""
    mixed = portions(*((n, Portion(share=None if s is None else ((0.0, s),))) for n, s in given))
    with pytest.raises(ValueError, match=message):
        epoch_amounts(mixed)


@pytest.mark.parametrize("steps", [None, 120])
def test_a_share_may_follow_a_schedule(steps: int | None) -> None:
    """From 0.9 to 0.1 over the run: about 0.8 in the first quarter, 0.6, 0.4 and 0.2 in the last; half of the whole."""
    falling = Portion(share=((0.0, 0.9), (1.0, 0.1)))
    mixed = portions((2000, falling), (2000, Portion()))
    plan = plan_steps(mixed, seed=0, examples_per_step=20, epochs=1, steps=steps)
    if steps is None:
        assert counts_of(plan) == {"s0": 2000, "s1": 2000}
    quarter = len(plan) // 4
    for number, expected in enumerate((0.8, 0.6, 0.4, 0.2)):
        counts = counts_of(plan[number * quarter : (number + 1) * quarter])
        assert counts["s0"] / sum(counts.values()) == pytest.approx(expected, abs=0.03)


def test_a_schedule_with_a_hold() -> None:
    """A source that enters at half of the run is not seen before."""
    late = Portion(share=((0.0, 0.0), (0.5, 0.0), (0.5001, 0.5), (1.0, 0.5)))
    plan = plan_steps(portions((900, Portion()), (300, late)), seed=0, examples_per_step=10, epochs=1, steps=None)
    half = len(plan) // 2
    assert counts_of(plan[: half - 1])["s1"] == 0
    after = counts_of(plan[half + 1 :])
    assert after["s1"] / sum(after.values()) == pytest.approx(0.5, abs=0.04)


def test_another_sources_share_keeps_the_order_within() -> None:
    """When one source's share changes, the others' rows come in the same order, only closer or farther apart."""
    streams = []
    for share in (0.1, 0.4):
        mixed = portions((200, Portion()), (500, Portion(share=((0.0, share),))))
        plan = plan_steps(mixed, seed=0, examples_per_step=16, epochs=1, steps=None)
        streams.append([name for step in plan for name in names(step) if name.startswith("s0")])
    assert streams[0] == streams[1]


def test_a_million_units_are_planned_at_once() -> None:
    """The last step of three epochs over a million units is there within seconds: nothing is read or replayed."""

    class Numbers:
        responses_U = np.ones(1_000_000, dtype=np.int64)

        def __len__(self) -> int:
            return 1_000_000

        def unit(self, index: int, pair_id: int = 0) -> tuple[Sequence, ...]:
            return (Sequence(np.zeros(0, dtype=np.int32), (Response(1, 2, 1.0, "score", str(index)),)),)

        def keys_of(self, index: int) -> tuple[bytes, ...]:
            return ()

    started = time.process_time()
    steps = plan_steps([Mixed("a", Numbers())], seed=0, examples_per_step=64, epochs=3, steps=None)
    assert len(steps) == 3_000_000 // 64
    assert len(steps[-1].responses) == 64
    assert time.process_time() - started < 20


def test_a_schedule_ends_where_the_run_ends() -> None:
    """With long conversations in one source, whose number in a step nobody knows before: the last steps have the last
    share, and the schedule never begins again."""
    falling = Portion(share=((0.0, 0.9), (1.0, 0.1)))
    single = Mixed("a", Held(source("a", [1] * 4000)), falling)
    talks = Mixed("b", Held(source("b", [12] * 60)), Portion(share=((0.0, 0.1), (1.0, 0.9))))
    plan = plan_steps([single, talks], seed=0, examples_per_step=16, epochs=1, steps=300)
    assert len(plan) == 300

    def share_of_a(steps: Sequence) -> float:
        held = Counter(r.origin.split(":")[0] for step in steps for r in step.responses)
        return held["a"] / sum(held.values())

    shares = [share_of_a(plan[start : start + 30]) for start in range(0, 300, 30)]
    assert shares[0] == pytest.approx(0.86, abs=0.05)
    assert shares[-1] == pytest.approx(0.14, abs=0.05)
    assert all(later < earlier + 0.05 for earlier, later in pairwise(shares))


@given(
    sizes=SIZES,
    passes=st.lists(st.floats(1e-4, 2.0), min_size=5, max_size=5),
    epochs=st.integers(1, 4),
)
def test_a_run_has_a_step_unless_its_epochs_take_nothing(sizes: list[int], passes: list[float], epochs: int) -> None:
    """The units that are counted ahead are those that the steps hold."""
    ingredients = portions(*((size, Portion(p)) for size, p in zip(sizes, passes, strict=False)))
    steps = plan_steps(ingredients, seed=0, examples_per_step=3, epochs=epochs, steps=None)
    assert units_of_epochs(ingredients, epochs) == sum(len(step.sequences) for step in steps)
