"""The simulation of ZeRO-3's gathers where its answer can be seen by hand; the rest is held against DeepSpeed."""

import pytest

from uft_ds.planning.gathers import Bounds, Visit, steady_gathers

LAYERS, LAYER, EMBEDDING, NORM, HEAD = 6, 100, 300, 1, 300
SIZES = [EMBEDDING, *[LAYER] * LAYERS, NORM, HEAD]
BYTES = [2] * len(SIZES)


def forward() -> list[Visit]:
    everything = tuple(range(len(SIZES)))
    layers = [Visit(f"layer {i}", (1 + i,), (1 + i,), is_leaf=True) for i in range(LAYERS)]
    ends = [Visit(name, (p,), (p,)) for name, p in (("embedding", 0), ("norm", LAYERS + 1), ("head", LAYERS + 2))]
    return [Visit("root", (), everything), ends[0], *layers, ends[1], ends[2]]


def backward() -> list[Visit]:
    root, embedding, *layers, norm, _ = forward()
    return [root, norm, *reversed(layers), embedding]


def times(bounds: Bounds, **options: bool) -> tuple[int, ...]:
    return steady_gathers(SIZES, BYTES, forward(), backward(), bounds, **options).times


def test_everything_but_the_head_is_gathered_twice() -> None:
    """With a forward first and no room to keep anything: once for each direction, the frozen head for one."""
    bounds = Bounds(prefetch=LAYER, max_live=4 * LAYER, max_reuse=1, persistence=0)
    assert times(bounds) == (2, *[2] * LAYERS, 2, 1)


def test_the_first_recorded_order_decides_what_is_kept() -> None:
    """With a training step first, a wide reuse distance keeps parameters from the forward to the backward."""
    bounds = Bounds(prefetch=LAYER, max_live=10**9, max_reuse=10**9, persistence=0)
    assert sum(times(bounds, begins_with_forward=False)) < sum(times(bounds, begins_with_forward=True))


def test_small_parameters_stay_where_they_are_told_to() -> None:
    """Those below the persistence threshold are not gathered again."""
    bounds = Bounds(prefetch=LAYER, max_live=4 * LAYER, max_reuse=1, persistence=NORM)
    assert times(bounds)[LAYERS + 1] == 0


@pytest.mark.parametrize("prefetch", [0, LAYER, 3 * LAYER])
def test_what_is_held_grows_with_what_is_prefetched(prefetch: int) -> None:
    """At least the largest module at work, and never more than the bounds and the buffers allow."""
    peak = steady_gathers(SIZES, BYTES, forward(), backward(), Bounds(prefetch, 10**9, 1, 0)).peak_bytes
    assert 2 * HEAD <= peak <= 2 * 2 * (HEAD + prefetch + LAYER + EMBEDDING)
    without = steady_gathers(SIZES, BYTES, forward(), backward(), Bounds(0, 10**9, 1, 0)).peak_bytes
    assert peak >= without
