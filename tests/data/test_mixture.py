"""The order of the mixture: everything once an epoch, evenly spread, from data and seed alone."""

import inspect
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uft_ds.data.example import Response, Sequence
from uft_ds.data.mixture import Step, in_order, mixed_order, plan_steps

SIZES = st.lists(st.integers(0, 40), min_size=1, max_size=4)


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


def plan(sources: list[tuple[Sequence, ...]], **changes) -> tuple[Step, ...]:
    labels = [f"source {i}" for i in range(len(sources))]
    return plan_steps(sources, labels, **{"seed": 0, "examples_per_step": 8, "epochs": 1, "steps": None} | changes)


@given(sizes=SIZES, seed=st.integers(0, 2**32), epoch=st.integers(0, 5))
def test_every_sequence_comes_once_an_epoch(sizes: list[int], seed: int, epoch: int) -> None:
    """The order of an epoch is a permutation of all sequences of all sources."""
    order = mixed_order(sizes, [str(i) for i in range(len(sizes))], seed=seed, epoch=epoch)
    assert sorted(order) == [(s, i) for s, size in enumerate(sizes) for i in range(size)]


def test_the_order_changes_with_seed_and_epoch() -> None:
    """The same arguments give the same order, another seed or epoch another one."""
    first, again, seed, epoch = (
        mixed_order([30, 30], ["a", "b"], seed=s, epoch=e) for s, e in ((1, 0), (1, 0), (2, 0), (1, 1))
    )
    assert first == again
    assert len({tuple(order) for order in (first, seed, epoch)}) == 3


def test_sources_of_one_label_are_shuffled_apart() -> None:
    """Two sources of the same file name do not come in the same order."""
    order = mixed_order([50, 50], ["a", "a"], seed=0, epoch=0)
    assert [i for s, i in order if s == 0] != [i for s, i in order if s == 1]


@given(sizes=st.lists(st.integers(1, 30), min_size=2, max_size=4), more=st.integers(1, 50), seed=st.integers(0, 99))
def test_growing_a_source_leaves_the_others_order(sizes: list[int], more: int, seed: int) -> None:
    """With more rows in one source, or without it, all others keep their relative order."""
    labels = [str(i) for i in range(len(sizes))]
    orders = [
        [(labels[s], i) for s, i in mixed_order(changed, labels, seed=seed, epoch=0) if s > 0]
        for changed in (sizes, [sizes[0] + more, *sizes[1:]])
    ]
    without = mixed_order(sizes[1:], labels[1:], seed=seed, epoch=0)
    assert orders[0] == orders[1] == [(labels[s + 1], i) for s, i in without]


@pytest.mark.parametrize("sizes", [(400, 400), (900, 100), (1000, 7, 93)])
def test_sources_are_spread_evenly(sizes: tuple[int, ...]) -> None:
    """Between any two positions a source is off its share by at most about one sequence per source.

    The k-th of n stands in [k / n, (k + 1) / n): a stretch that covers a share f of the epoch holds f n +- 2 of it;
    the stretch's own length, counted in sequences, is uncertain by as much for every source.
    """
    order = mixed_order(sizes, [str(i) for i in range(len(sizes))], seed=3, epoch=0)
    quarter = len(order) // 4
    for start in range(0, 4 * quarter, quarter):
        counts = Counter(s for s, _ in order[start : start + quarter])
        for s, size in enumerate(sizes):
            assert abs(counts[s] - size / 4) <= 2 * len(sizes)


def test_a_source_is_shuffled_within() -> None:
    """Spreading is not the file's order: the first quarter of an epoch draws from all of a file."""
    first = [i for _, i in mixed_order([400], ["a"], seed=0, epoch=0)][:100]
    assert first != sorted(first)
    assert all(any(low <= i < low + 100 for i in first) for low in range(0, 400, 100))


def test_responses_of_step_n_depend_on_recipe_data_seed_and_n_only() -> None:
    """Invariant 3: a plan knows no rank and no restart, and step n is the same however far the plan goes."""
    parameters = set(inspect.signature(plan_steps).parameters)
    assert parameters == {"sources", "labels", "seed", "examples_per_step", "epochs", "steps"}
    sources = [source("a", [1, 2, 3] * 5), source("b", [1] * 20)]
    longest = plan(sources, steps=40)
    assert [names(step) for step in plan(sources, steps=40)] == [names(step) for step in longest]
    for steps in (1, 3, 17):
        assert [names(step) for step in plan(sources, steps=steps)] == [names(step) for step in longest[:steps]]
    one_epoch = plan(sources, epochs=1)
    assert [names(step) for step in one_epoch[:-1]] == [names(step) for step in longest[: len(one_epoch) - 1]]


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
    steps = plan(sources, examples_per_step=examples_per_step, epochs=epochs, seed=seed)
    assert [step.index for step in steps] == list(range(len(steps)))
    for step in steps[:-1]:
        assert len(step.responses) >= examples_per_step
    for step in steps:
        assert len(step.responses) - len(step.sequences[-1].responses) < examples_per_step
    everything = Counter(name for step in steps for name in names(step))
    assert everything == {f"{i}:{j}": epochs for i, c in enumerate(counts) for j in range(len(c))}


def test_the_last_step_holds_what_is_left() -> None:
    """Twenty responses in steps of eight: 8, 8 and 4."""
    assert [len(step.responses) for step in plan([source("a", [1] * 20)])] == [8, 8, 4]


def test_steps_repeat_the_mixture() -> None:
    """Ten steps of eight from twenty: 80 responses are four epochs, each sequence once in each, in a new order."""
    steps = plan([source("a", [1] * 20)], steps=10, epochs=1)
    assert [len(step.responses) for step in steps] == [8] * 10
    stream = [name for step in steps for name in names(step)]
    epochs = [stream[start : start + 20] for start in range(0, 80, 20)]
    assert all(sorted(epoch) == sorted(f"a:{i}" for i in range(20)) for epoch in epochs)
    assert all(one != other for one, other in pairwise(epochs))


def test_steps_may_be_fewer_than_an_epoch() -> None:
    """`steps` wins over `epochs`."""
    assert len(plan([source("a", [1] * 100)], steps=2, epochs=3)) == 2


def test_a_sequence_of_many_responses_may_overfill_a_step() -> None:
    """Conversations are not torn: a step of eight with sequences of five holds ten."""
    assert [len(step.responses) for step in plan([source("a", [5] * 4)])] == [10, 10]


def test_held_out_data_keeps_its_order() -> None:
    """Held-out groups are the file's order, so that a curve compares the same groups at each evaluation."""
    steps = in_order(source("a", [1, 3, 2, 1]), 4)
    assert [names(step) for step in steps] == [["a:0", "a:1"], ["a:2", "a:3"]]
    assert [step.index for step in steps] == [0, 1]
    assert in_order((), 4) == ()
