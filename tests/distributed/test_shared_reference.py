"""The reference cache on real ranks: the same numbers, restarts bit for bit, runs that share one store."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from engines import engine_of
from pools import Held, plan
from ranks import run_on_ranks
from runs import TIMEOUT_SECONDS, forked, program, uft, write_recipe
from safetensors.torch import load_file
from toy import UFT, toy_sequences

from uft_ds.data.mixture import Step, in_order
from uft_ds.engine.engine import Engine
from uft_ds.known.cache import REFERENCE_TABLE, STORED_ROUNDING_NATS, Known, fill
from uft_ds.known.store import ReferenceStore, read_table, write_table
from uft_ds.recipe.to_settings import load_settings
from uft_ds.record.metrics_file import read_metrics
from uft_ds.record.run_folder import RunFolder
from uft_ds.run.build import build_reference_cache
from uft_ds.streams.identity import reference_identity
from uft_ds.training.evaluate import evaluate
from uft_ds.training.forwarding import Method
from uft_ds.training.step import run_step

IDENTITY = "d" * 64
SEQUENCES = toy_sequences(10, seed=4)
STEPS: tuple[Step, ...] = tuple(plan(SEQUENCES, seed=1, examples_per_step=9, epochs=3))
"""Three epochs; steps are larger than an epoch's remainder, so some hold known and unknown responses."""

RATE = 3e-3


def train(engine: Engine, cache: Known, steps: tuple[Step, ...]) -> tuple[list[float], list[float]]:
    """The loss of each step, and how many references it computed."""
    metrics = [run_step(Method(engine, UFT, cache, 64), step, RATE)[1] for step in steps]
    return [m["loss"] for m in metrics], [m["reference/computed"] for m in metrics]


def cached_and_live(folder: Path, mode: str) -> Any:
    live = train(engine_of(folder, reference_mode=mode), Known.of_reference("lockstep"), STEPS)
    cached = train(engine_of(folder, reference_mode=mode), Known.of_reference("cached"), STEPS)
    return live, cached


@pytest.mark.long
@pytest.mark.parametrize("mode", ["lockstep", "separate"])
def test_a_cached_reference_trains_the_same(tiny_qwen2: Path, mode: str) -> None:
    """Three epochs: each response's reference is computed once, and the losses are the live reference's to 1e-5."""
    for (live, always), (cached, computed) in run_on_ranks(cached_and_live, 2, tiny_qwen2, mode):
        assert always == [len(step.responses) for step in STEPS]
        seen: set[bytes] = set()
        for step, count in zip(STEPS, computed, strict=True):
            unseen = [s for s in step.sequences if not set(s.response_keys) <= seen]
            assert count == sum(len(s.responses) for s in unseen)
            seen |= {key for s in step.sequences for key in s.response_keys}
        assert computed[0] > 0
        assert computed[-1] == 0
        assert any(0 < count < always[i] for i, count in enumerate(computed)), "no step was mixed"
        assert cached == pytest.approx(live, rel=1e-5)


def unbroken_and_restarted(folder: Path, work: Path) -> Any:
    """Invariant 4: the run, and the same run stopped after `k` steps, while another adds to the store."""
    k = 3
    snapshot = {SEQUENCES[3].response_keys[0]: -20.0 - 1e-3}  # not what would be computed: it must be kept

    def new_cache() -> Known:
        store = ReferenceStore.below(work, IDENTITY) if engine.rank == 0 else None
        return Known.of_reference("cached", snapshot, identity=IDENTITY, store=store)

    engine = engine_of(folder)
    unbroken, _ = train(engine, new_cache(), STEPS)

    engine = engine_of(folder)
    cache = new_cache()
    before, _ = train(engine, cache, STEPS[:k])
    checkpoint = work / f"checkpoint-{engine.rank}"
    checkpoint.mkdir()
    write_table(checkpoint / REFERENCE_TABLE, *cache.table())
    if engine.rank == 0:
        ReferenceStore.below(work, IDENTITY).write({key: -3.0 for s in SEQUENCES for key in s.response_keys})
    resumed = Known.of_reference("cached", read_table(checkpoint / REFERENCE_TABLE, IDENTITY), identity=IDENTITY)
    after, _ = train(engine, resumed, STEPS[k:])
    return unbroken, before + after


@pytest.mark.long
def test_a_restart_with_the_cache_is_bit_exact(tiny_qwen2: Path, tmp_path: Path) -> None:
    """What other runs have stored meanwhile changes no bit; what the checkpoint's table holds is used."""
    for unbroken, restarted in run_on_ranks(unbroken_and_restarted, 2, tiny_qwen2, tmp_path):
        assert unbroken == restarted
        assert len(set(unbroken)) == len(STEPS)


def before_the_first_step(base: Path) -> Any:
    """What is said of held-out data and of a step while nothing is trained, from stored values that are rounded
    otherwise, as on another kind of machine: as a run says it, with the bound alone, and with neither."""
    engine = engine_of(base, b_std=0.0)
    groups = in_order([Held(SEQUENCES)], 9)
    filled = Known.of_reference("cached", rounding=STORED_ROUNDING_NATS[torch.float32])
    fill(engine, filled, groups, 64, flush_every=9)
    rounding_noise = np.random.default_rng(0).normal(scale=5e-6, size=len(filled.table()[0]))
    table = {key: value + noise for (key, value), noise in zip(filled.table()[0].items(), rounding_noise, strict=True)}
    found = []
    for rounding, policy_is_reference in ((filled.rounding, True), (filled.rounding, False), (0.0, False)):
        known = Known.of_reference("cached", table, rounding=rounding)
        method = Method(engine, UFT, known, 256, policy_is_reference)
        held_out = evaluate(method, groups).metrics
        found.append((held_out, run_step(method, groups[0], 0.0).metrics))
    return found


def test_nothing_is_ordered_before_the_first_step_with_a_warm_cache(tiny_qwen2: Path) -> None:
    """No correlation, every log-ratio exactly 0 and the loss exactly that of a cold cache; without the bound on what
    is stored the rounding of another packing is taken for an order."""
    as_run, bounded, unbounded = run_on_ranks(before_the_first_step, 2, tiny_qwen2)[0]
    orders = ("rank_correlation/score", "length_correlation/score", "length_correlation/instruction")
    for held_out, of_step in (as_run, bounded):
        assert of_step["reference/computed"] == 0.0, "nothing was stored"
        assert all(math.isnan(held_out[f"held_out/{name}"]) for name in orders)
        assert all(math.isnan(of_step[name]) for name in orders)
    for kind in ("instruction", "score"):
        assert as_run[0][f"held_out/log_ratio/{kind}"] == as_run[1][f"log_ratio/{kind}"] == 0.0
        assert as_run[0][f"held_out/implicit_score/{kind}"] == 0.5
    assert any(math.isfinite(unbounded[0][f"held_out/{name}"]) for name in orders), "equal without rounding: no test"


class Recorder:
    """Keeps what a run would have said."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.warned: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def warn(self, text: str) -> None:
        self.warned.append(text)


CONTENT = {"weights": ["0" * 64], "config": "1" * 64, "adapter": None}


def open_cache(base: Path, work: Path, store_values: float | None) -> Any:
    """What a run makes of a store that holds the right values plus `store_values` (None: not a number)."""
    settings = load_settings(str(work / "recipe.yaml"))
    engine = engine_of(base)
    identity = reference_identity(CONTENT, dtype="float32", attention=engine.module.attention, adapter_dtype=None)
    pools = [Held(SEQUENCES)]
    groups = in_order(pools, 4)
    right = Known.of_reference("cached")
    fill(engine, right, groups, 64, flush_every=9)
    if engine.rank == 0:
        offset = math.nan if store_values is None else store_values
        keys = [key for s in SEQUENCES for key in s.response_keys]
        ReferenceStore.below(work / "reference", identity).write({key: right.known(key) + offset for key in keys})
    torch.distributed.barrier()
    recorder = Recorder()
    cache = build_reference_cache(settings, RunFolder(work), engine, engine.module, pools, recorder)  # type: ignore[arg-type]
    return cache.num_known, recorder.said, recorder.warned


@pytest.mark.parametrize(
    ("offset", "known", "message"),
    [
        pytest.param(0.0, True, "compared with the reference itself, at most", marks=pytest.mark.long),
        (2e-3, False, "0.002 nats from the reference itself, more than rounding: none of"),
        pytest.param(None, False, "holds a log-prob that is not finite; renamed to ", marks=pytest.mark.long),
    ],
)
def test_wrong_values_are_found_said_and_not_used(
    tiny_qwen2: Path, tmp_path: Path, offset: float | None, known: bool, message: str
) -> None:
    """Whole files with wrong numbers: two thousandths of a nat are more than float32's rounding of 40 tokens.

    Found on all ranks, said by one, and the file is renamed so that no run reads it again.
    """
    write_recipe(tmp_path, tiny_qwen2)
    identity = {"base": {key: CONTENT[key] for key in ("weights", "config")}, "adapter": CONTENT["adapter"]}
    (tmp_path / "identity.json").write_text(json.dumps(identity))
    first, second = run_on_ranks(open_cache, 2, tiny_qwen2, tmp_path, offset)
    assert (first[0] > 0) == (second[0] > 0) == known
    said = first[1] if known else first[2]
    assert any(message in text for text in said), (said, message)
    stored = sorted(path.suffix for path in (tmp_path / "reference").rglob("*.*"))
    assert stored == [".safetensors" if known else ".rejected"]


def open_other_attention(base: Path, work: Path) -> Any:
    """What a resumed run makes of a checkpoint whose values another attention has computed."""
    settings, engine, recorder = load_settings(str(work / "recipe.yaml")), engine_of(base), Recorder()
    pools, folder, checkpoint = [Held(SEQUENCES)], RunFolder(work), work / "step-000004"
    if engine.rank == 0:
        checkpoint.mkdir()
        identity = reference_identity(CONTENT, dtype="float32", attention="eager", adapter_dtype=None)
        write_table(checkpoint / REFERENCE_TABLE, dict.fromkeys(SEQUENCES[0].response_keys, -1.0), identity)
    cache = build_reference_cache(settings, folder, engine, engine.module, pools, recorder, checkpoint)  # type: ignore[arg-type]
    return cache.num_known, recorder.warned


def test_values_of_another_attention_are_computed_anew(tiny_qwen2: Path, tmp_path: Path) -> None:
    """As where a newer version selects another one. They are not mixed, and no reason to refuse the resume."""
    write_recipe(tmp_path, tiny_qwen2)
    identity = {"base": {key: CONTENT[key] for key in ("weights", "config")}, "adapter": CONTENT["adapter"]}
    (tmp_path / "identity.json").write_text(json.dumps(identity))
    (known, warned), (known_too, _) = run_on_ranks(open_other_attention, 2, tiny_qwen2, tmp_path)
    assert known == known_too == 0
    assert [text for text in warned if "attention eager computed what step-000004 holds" in text]


@pytest.mark.long
def test_runs_share_what_uft_reference_has_filled(tiny_qwen2: Path, tmp_path: Path) -> None:
    """Two fills of different data at once, then a run over all of it, with another beta and lr, that computes nothing.

    Each fill stores what the other lacks: had one of them been lost, the run would compute it.
    """
    recipe = write_recipe(tmp_path, tiny_qwen2)
    parts = []
    for number, kept in enumerate(("instruction", "scored")):
        tree = yaml.safe_load(recipe.read_text())
        tree["data"]["sources"] = [s for s in tree["data"]["sources"] if kept in s["path"]]
        tree["data"]["held_out"] = tree["data"]["held_out"] if number else []
        parts.append(tmp_path / f"part-{number}.yaml")
        parts[-1].write_text(yaml.safe_dump(tree))
    fills = [program("uft_ds", "reference", str(part)) for part in parts]
    try:
        for fill_process in fills:
            out, err = fill_process.communicate(timeout=TIMEOUT_SECONDS)
            assert fill_process.returncode == 0, out + err
            assert "distinct responses of " in out
            assert ": 0 were known, 16 computed and stored below " in out
    finally:
        for fill_process in fills:
            fill_process.kill_group()
    assert not (tmp_path / "run").exists(), "the recipe's own output is not touched"
    result = uft("train", str(recipe), "objective.beta=0.05", "train.lr=3e-3")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "32 responses known; 16 compared with the reference itself" in result.stdout
    lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "reference/computed" in line]
    assert [line["reference/computed"] for line in lines] == [0.0] * 4
    assert lines[0]["loss/instruction"] == pytest.approx(0.25, rel=1e-6)


@pytest.mark.long
def test_a_run_starts_from_another_runs_adapter(tiny_qwen2: Path, tmp_path: Path) -> None:
    """`reference.adapter: RUN` by torchrun alone: its newest checkpoint is reference and start of the policy."""
    first = uft("train", str(write_recipe(tmp_path, tiny_qwen2)), "train.steps=2", "objective.loss=nll")
    assert first.returncode == 0, first.stdout + first.stderr
    assert not (tmp_path / "reference").exists(), "likelihood alone needs no reference, and no store"
    second = forked(
        *("torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("-m", "uft_ds.train", str(tmp_path / "recipe.yaml"), f"reference.adapter={tmp_path / 'run'}"),
        *(f"output={tmp_path / 'second'}", "train.lr=1e-3"),
    )
    assert second.returncode == 0, second.stdout + second.stderr
    assert "every log-ratio is 0.0 nats" in second.stdout
    adapter = tmp_path / "run" / "checkpoints" / "step-000002" / "adapter"
    assert load_settings(str(tmp_path / "second" / "recipe.yaml")).reference.adapter == str(adapter)
    before, after = (load_file(a / "adapter_model.safetensors") for a in (adapter, tmp_path / "second/latest/adapter"))
    assert set(before) == set(after)
    assert all(0 < (after[name] - before[name]).abs().max() < 0.02 for name in before), "four small steps from it"
