"""What a run knows of its reference, and what it forwards: on one rank, with an engine that only counts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pools import Held
from recipes import MINIMAL
from torch import Tensor
from torch.overrides import TorchFunctionMode
from toy import toy_sequences

from uft_ds.data.example import Response, Sequence
from uft_ds.data.micro_batch import MicroBatch, micro_batch
from uft_ds.data.mixture import Step
from uft_ds.data.packing import rank_micro_batches
from uft_ds.errors import Stopped, UserError
from uft_ds.known.cache import REFERENCE_TABLE, Known, StreamValues, fill
from uft_ds.known.store import ReferenceStore, read_table, write_table
from uft_ds.objectives.reference import REFERENCE_STREAM
from uft_ds.recipe.to_settings import load_settings
from uft_ds.streams.stream import BARE_BASE, Output, Stream, logps_of
from uft_ds.training.evaluate import known_sequences

IDENTITY = "c" * 64
TOKENS = 100


class CountingEngine:
    """One rank whose reference says of a response the sum of its tokens, negated, and counts what it is asked."""

    def __init__(self) -> None:
        self.forwarded: list[str] = []
        self.noise = 0.0
        self.streams = {"reference": BARE_BASE}

    def micro_batches(self, step: Step, tokens: int) -> list[MicroBatch]:
        return rank_micro_batches(step, tokens_per_micro_batch=tokens, rank=0, world_size=1)

    def __call__(self, batch: MicroBatch, streams: Seq[Stream]) -> dict[str, Output]:
        assert streams == [BARE_BASE]
        self.forwarded += [response.origin for response in batch.responses]
        return {"reference": Output(-batch.targets_N.double())}

    def reference_logps(self, batch: MicroBatch) -> Tensor:
        return logps_of(self(batch, [BARE_BASE]), batch)["reference"] + self.noise

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        return values

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        yield


def visit(engine: CountingEngine, cache: Known, step: Step) -> tuple[dict[str, float], int]:
    """One step as the loop runs it: the reference by origin, and how many responses were forwarded."""
    found: dict[str, float] = {}
    for batch, forward in cache.micro_batches(engine, step, TOKENS):  # type: ignore[arg-type]
        logps_R = cache.resolve(batch, engine.reference_logps(batch) if forward else None)
        assert logps_R is not None
        assert logps_R.dtype == torch.float64
        found |= dict(zip((r.origin for r in batch.responses), logps_R.tolist(), strict=True))
    return found, cache.learn(engine, step)  # type: ignore[arg-type]


def expected(step: Step) -> dict[str, float]:
    return {r.origin: -float(s.token_ids_T[r.start : r.end].sum()) for s in step.sequences for r in s.responses}


@pytest.fixture
def engine() -> CountingEngine:
    return CountingEngine()


SEQUENCES = toy_sequences(6)
STEP = Step(0, SEQUENCES)


def test_each_response_is_forwarded_once(engine: CountingEngine) -> None:
    """The second visit forwards nothing and hands out the very same values."""
    cache = Known.of_reference("cached")
    first, computed = visit(engine, cache, STEP)
    assert first == expected(STEP)
    assert computed == len(STEP.responses) == len(engine.forwarded)
    second, computed = visit(engine, cache, STEP)
    assert second == first
    assert computed == 0
    assert len(engine.forwarded) == len(STEP.responses)


def test_a_mixed_step_forwards_only_what_is_new(engine: CountingEngine) -> None:
    """Four of six sequences known: the other two ride apart, and every response has its value."""
    cache = Known.of_reference("cached")
    visit(engine, cache, Step(0, SEQUENCES[:4]))
    engine.forwarded.clear()
    found, computed = visit(engine, cache, STEP)
    assert found == expected(STEP)
    new = [response.origin for sequence in SEQUENCES[4:] for response in sequence.responses]
    assert sorted(engine.forwarded) == sorted(new)
    assert computed == len(new)


def test_a_response_is_known_by_its_prefix_and_span() -> None:
    """What follows a response does not matter; a token before it, in it, or where it starts, does."""
    tokens = np.arange(3, 23, dtype=np.int32)

    def key(ids: np.ndarray, start: int = 5, end: int = 9) -> bytes:
        return Sequence(ids, (Response(start, end, 0.5, "score", "x"),)).response_keys[0]

    def changed(place: int) -> np.ndarray:
        ids = tokens.copy()
        ids[place] += 1
        return ids

    assert key(tokens) == key(tokens[:9]) == key(changed(9)) == key(tokens.astype(np.int64))
    different = [key(changed(0)), key(changed(5)), key(changed(8)), key(tokens, 4, 9), key(tokens, 5, 10)]
    assert len({key(tokens), *different}) == 6
    both = Sequence(tokens, (Response(2, 4, 0.5, "score", "x"), Response(5, 9, 1.0, "instruction", "y")))
    assert both.response_keys[1] == key(tokens), "score, kind, origin and other responses do not matter"


def test_the_same_content_twice_in_a_step(engine: CountingEngine) -> None:
    """Both are forwarded once, together, and known as one."""
    twin = Sequence(SEQUENCES[0].token_ids_T, tuple(Response(r.start, r.end, 0.1, "score", "twin") for r in
                                                    SEQUENCES[0].responses))  # fmt: skip
    step = Step(0, (SEQUENCES[0], twin))
    cache = Known.of_reference("cached")
    _, computed = visit(engine, cache, step)
    assert computed == 2 * len(twin.responses)
    assert cache.num_known == len(twin.responses)
    found, _ = visit(engine, cache, step)
    assert found == expected(step)


def test_a_value_that_is_not_finite_is_never_known(engine: CountingEngine) -> None:
    """A NaN of one bad step must not outlive it."""
    cache = Known.of_reference("cached")
    engine.noise = math.nan
    visit(engine, cache, STEP)
    assert cache.num_known == 0
    engine.noise = 0.0
    assert visit(engine, cache, STEP) == (expected(STEP), len(STEP.responses))


def test_the_first_value_stays(engine: CountingEngine) -> None:
    """A known response that is forwarded again beside an unknown one keeps its value: restarts depend on it."""
    sequence = next(s for s in toy_sequences(20) if len(s.responses) > 1)
    part = Sequence(sequence.token_ids_T, sequence.responses[:1])
    cache = Known.of_reference("cached")
    visit(engine, cache, Step(0, (part,)))
    before = cache.known(part.response_keys[0])
    engine.noise = 0.5
    _, computed = visit(engine, cache, Step(1, (sequence,)))
    assert computed == len(sequence.responses)
    assert cache.known(part.response_keys[0]) == before


def test_without_memory_each_visit_forwards(engine: CountingEngine) -> None:
    """`live` forwards always, `unneeded` never; neither keeps anything."""
    live = Known.of_reference("lockstep")
    assert visit(engine, live, STEP) == visit(engine, live, STEP) == (expected(STEP), len(STEP.responses))
    assert live.num_known == 0
    unneeded = Known.of_reference("none")
    for batch, forward in unneeded.micro_batches(engine, STEP, TOKENS):  # type: ignore[arg-type]
        assert not forward
        assert unneeded.resolve(batch, None) is None
    assert unneeded.learn(engine, STEP) == 0  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "each_visit"),
    [
        (["objective.loss=nll"], [0, 0]),
        (["objective.loss=nll", "reference.cache=false"], [0, 0]),
        ([], [1, 0]),
        (["reference.mode=separate"], [1, 0]),
        (["reference.cache=false"], [1, 1]),
        (["reference.cache=false", "reference.mode=separate"], [1, 1]),
    ],
    ids=lambda value: " ".join(value) if value and isinstance(value[0], str) else "",
)
def test_a_recipe_decides_how_often_the_reference_is_forwarded(
    engine: CountingEngine, tmp_path: Path, settings: list[str], each_visit: list[int]
) -> None:
    """Two visits of the same responses: never without a loss that compares, once with the cache, else each time."""
    path = tmp_path / "recipe.yaml"
    path.write_text(MINIMAL)
    cache = Known.of_reference(load_settings(str(path), settings).reference.how)
    forwarded: list[int] = []
    for _ in range(2):
        for batch, forward in cache.micro_batches(engine, STEP, TOKENS):  # type: ignore[arg-type]
            cache.resolve(batch, engine.reference_logps(batch) if forward else None)
        cache.learn(engine, STEP)  # type: ignore[arg-type]
        forwarded.append(len(engine.forwarded) - sum(forwarded))
    assert forwarded == [share * len(STEP.responses) for share in each_visit]


def test_a_sweep_computes_the_reference_once(engine: CountingEngine, tmp_path: Path) -> None:
    """Four runs over the same data: the first forwards all of it, the others none."""
    computed = []
    for _ in range(4):
        store = ReferenceStore.below(tmp_path, IDENTITY)
        cache = Known.of_reference("cached", store.read().table, identity=IDENTITY, store=store)
        computed.append(visit(engine, cache, STEP)[1])
        cache.flush()
    assert computed == [len(STEP.responses), 0, 0, 0]


def test_a_table_in_a_checkpoint_is_all_that_is_known(engine: CountingEngine, tmp_path: Path) -> None:
    """Invariant 4: snapshot and found values come back bit for bit; what is learnt later is not in the copy."""
    snapshot = {SEQUENCES[0].response_keys[0]: -1.25}
    cache = Known.of_reference("cached", snapshot, identity=IDENTITY)
    visit(engine, cache, STEP)
    known, identity = cache.table()
    write_table(tmp_path / REFERENCE_TABLE, known, identity)
    known.clear()
    assert len(cache.table()[0]) == len(STEP.responses)
    table = read_table(tmp_path / REFERENCE_TABLE, IDENTITY)
    assert len(table) == len(STEP.responses)
    assert table[SEQUENCES[0].response_keys[0]] == -1.25


def test_a_store_that_fails_is_said_once_and_left_alone(engine: CountingEngine, tmp_path: Path) -> None:
    """A full disk must not end a run: the values stay in its memory and its checkpoints. A fill has nothing else."""
    (tmp_path / IDENTITY[:32]).write_text("a file where the folder should be")
    store = ReferenceStore.below(tmp_path, IDENTITY)
    cache = Known.of_reference("cached", identity=IDENTITY, store=store)
    said = []
    for sequences in (SEQUENCES[:3], SEQUENCES[3:]):
        visit(engine, cache, Step(0, sequences))
        said.append(cache.flush())
    assert said[0] is not None
    assert "cannot be written" in said[0]
    assert said[1] is None
    assert cache.num_known == len(STEP.responses)
    filling = Known.of_reference("cached", identity=IDENTITY, store=store)
    with pytest.raises(UserError, match=r"reference\.cache_dir: .*cannot be written"):
        fill(engine, filling, [STEP], TOKENS, flush_every=1)  # type: ignore[arg-type]


def test_what_is_forgotten_is_computed_again(engine: CountingEngine) -> None:
    """Values that failed the check against the reference itself are not used."""
    wrong = {key: -7.0 for sequence in SEQUENCES for key in sequence.response_keys}
    cache = Known.of_reference("cached", wrong)
    assert visit(engine, cache, STEP)[1] == 0
    cache.forget()
    assert visit(engine, cache, STEP) == (expected(STEP), len(STEP.responses))


def test_fill_stores_on_the_way_and_goes_on_where_it_was(engine: CountingEngine, tmp_path: Path) -> None:
    """Killed after two of three groups, a second fill computes the third alone."""
    groups = [Step(i, SEQUENCES[2 * i : 2 * i + 2]) for i in range(3)]
    store = ReferenceStore.below(tmp_path, IDENTITY)

    class KilledError(Exception):
        pass

    seen: list[int] = []

    def die_after_two(visited: int, computed: int) -> None:
        assert computed == visited
        seen.append(computed)
        if len(seen) == 2:
            raise KilledError

    cache = Known.of_reference("cached", identity=IDENTITY, store=store)
    with pytest.raises(KilledError):
        fill(engine, cache, groups, TOKENS, flush_every=1, on_group=die_after_two)  # type: ignore[arg-type]
    again = Known.of_reference("cached", store.read().table, identity=IDENTITY, store=store)
    engine.forwarded.clear()
    fill(engine, again, groups, TOKENS, flush_every=1)  # type: ignore[arg-type]
    assert len(engine.forwarded) == len(groups[2].responses)
    assert len(store.read().table) == len(STEP.responses)


def test_known_pairs_are_checked_as_pairs() -> None:
    """Each pair that the spot check takes has a number of its own: they are packed as pairs, not as one."""
    rng = np.random.default_rng(0)
    sides = [
        Sequence(
            rng.integers(3, 99, size=9).astype(np.int32),
            (Response(5, 9, float(1 - i % 2), "pair", "", pair_id=i // 2),),
        )
        for i in range(8)
    ]
    pool = Held(tuple(sides))
    assert len(pool) == 4
    cache = Known.of_reference("cached", {key: 0.0 for side in sides for key in side.response_keys})
    chosen = Step(0, known_sequences(cache, [Held(()), pool], 6))
    assert [len(unit) for unit in chosen.units] == [2, 2, 2]
    batches = rank_micro_batches(chosen, tokens_per_micro_batch=20, rank=0, world_size=1)
    assert [batch.pairs for batch in batches] == [((0, 1),)] * 3


def test_what_is_learnt_in_a_block_that_is_left_early_is_forgotten(engine: CountingEngine) -> None:
    """Invariant 4: an evaluation that is broken off is done again as if nothing of it had been; the rest stays."""
    cache = Known.of_reference("cached", {SEQUENCES[0].response_keys[0]: -1.25}, identity=IDENTITY)
    before = cache.table()

    def stop() -> None:
        with cache.all_or_nothing():
            visit(engine, cache, STEP)
            assert cache.num_known == len(STEP.responses)
            raise Stopped

    with pytest.raises(Stopped):
        stop()
    assert cache.table() == before
    with cache.all_or_nothing():
        visit(engine, cache, STEP)
    assert cache.num_known == len(STEP.responses)


def test_known_values_are_handed_out_without_a_wait(engine: CountingEngine) -> None:
    """A tensor that is made on a GPU from a list waits for all that is queued there, a copy from the host does not."""
    cache = Known.of_reference("cached")
    visit(engine, cache, STEP)
    made_there: list[Any] = []

    class Watching(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is torch.tensor:
                made_there.append((kwargs or {}).get("device"))
            return function(*args, **(kwargs or {}))

    (batch,) = engine.micro_batches(STEP, 10_000)
    with Watching():
        values_R = cache.values(batch.to(torch.device("meta")))
    assert values_R.device.type == "meta"
    assert made_there == [None]


def test_streams_are_known_apart() -> None:
    """Each stream has its own table, identity and store: what one learns, the other does not know."""
    engine: Any = CountingEngine()
    known = Known(
        {
            REFERENCE_STREAM: StreamValues("cached", identity=IDENTITY),
            "reward": StreamValues("cached", dict.fromkeys(SEQUENCES[0].response_keys, 0.5), identity="d" * 64),
        }
    )
    assert known.unknown(Step(0, SEQUENCES[:1]), "reward").sequences == ()
    assert known.unknown(Step(0, SEQUENCES[:1])).sequences == SEQUENCES[:1]
    with pytest.raises(KeyError):
        known.values(micro_batch(SEQUENCES[:1]))
    for batch, _ in known.micro_batches(engine, STEP, TOKENS):
        known.resolve(batch, engine.reference_logps(batch))
        is_new = torch.tensor([not known.has(key, "reward") for key in batch.response_keys])
        known.resolve(batch, torch.where(is_new, 0.25, 0.5).double(), "reward")
    assert known.learn(engine, STEP) == len(STEP.responses)
    batch = micro_batch(SEQUENCES)
    logps = dict(zip((r.origin for r in batch.responses), known.values(batch).tolist(), strict=True))
    assert logps == expected(STEP)
    first = len(SEQUENCES[0].responses)
    assert known.values(batch, "reward").tolist() == [0.5] * first + [0.25] * (batch.num_responses - first)
    assert [known.table(name)[1] for name in (REFERENCE_STREAM, "reward")] == [IDENTITY, "d" * 64]
    known.forget("reward")
    assert known.table("reward")[0] == {}
    assert known.num_known == batch.num_responses


def test_what_is_known_includes_the_reference() -> None:
    """A run without a reference says so by its name, not by leaving it out."""
    with pytest.raises(ValueError, match="expected 'reference' among them"):
        Known({"reward": StreamValues("cached")})
