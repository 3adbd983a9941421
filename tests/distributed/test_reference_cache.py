"""The reference cache on real ranks: the same numbers, restarts bit for bit, runs that share one store."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ranks import run_on_ranks
from test_gradient_scale import engine_of
from test_training_run import TIMEOUT_SECONDS, losses, uft, write_recipe
from toy import UFT, toy_sequences

from uft_ds.data.mixture import Step, plan_steps
from uft_ds.training.engine import Engine
from uft_ds.training.loop import run_step
from uft_ds.training.metrics import read_metrics
from uft_ds.training.reference_cache import REFERENCE_TABLE, ReferenceCache
from uft_ds.training.reference_store import ReferenceStore, read_table

IDENTITY = "d" * 64
SEQUENCES = toy_sequences(10, seed=4)
STEPS: tuple[Step, ...] = plan_steps([SEQUENCES], ["toy"], seed=1, examples_per_step=9, epochs=3, steps=None)
"""Three epochs; steps are larger than an epoch's remainder, so some hold known and unknown responses."""

RATE = 3e-3


def train(engine: Engine, cache: ReferenceCache, steps: tuple[Step, ...]) -> tuple[list[float], list[float]]:
    """The loss of each step, and how many references it computed."""
    metrics = [run_step(engine, UFT, step, RATE, 64, cache)[1] for step in steps]
    return [m["loss"] for m in metrics], [m["reference/computed"] for m in metrics]


def cached_and_live(folder: Path, mode: str) -> Any:
    live = train(engine_of(folder, reference_mode=mode), ReferenceCache("live"), STEPS)
    cached = train(engine_of(folder, reference_mode=mode), ReferenceCache("remembered"), STEPS)
    return live, cached


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

    def new_cache() -> ReferenceCache:
        store = ReferenceStore.below(work, IDENTITY) if engine.rank == 0 else None
        return ReferenceCache("remembered", snapshot, identity=IDENTITY, store=store)

    engine = engine_of(folder)
    unbroken, _ = train(engine, new_cache(), STEPS)

    engine = engine_of(folder)
    cache = new_cache()
    before, _ = train(engine, cache, STEPS[:k])
    checkpoint = work / f"checkpoint-{engine.rank}"
    checkpoint.mkdir()
    cache.save(checkpoint)
    if engine.rank == 0:
        ReferenceStore.below(work, IDENTITY).write({key: -3.0 for s in SEQUENCES for key in s.response_keys})
    resumed = ReferenceCache("remembered", read_table(checkpoint / REFERENCE_TABLE, IDENTITY), identity=IDENTITY)
    after, _ = train(engine, resumed, STEPS[k:])
    return unbroken, before + after


def test_a_restart_with_the_cache_is_bit_exact(tiny_qwen2: Path, tmp_path: Path) -> None:
    """What other runs have stored meanwhile changes no bit; what the checkpoint's table holds is used."""
    for unbroken, restarted in run_on_ranks(unbroken_and_restarted, 2, tiny_qwen2, tmp_path):
        assert unbroken == restarted
        assert len(set(unbroken)) == len(STEPS)


def computed(run: Path) -> list[float]:
    return [line["reference/computed"] for line in read_metrics(run / "metrics.jsonl") if "reference/computed" in line]


def test_runs_share_what_uft_reference_has_filled(tiny_qwen2: Path, tmp_path: Path) -> None:
    """Two fills at once lose nothing; a run with another beta and lr computes no reference, and trains the same.

    37 responses, of which 5 held-out ones are the same as 5 of the training data.
    """
    recipe = str(write_recipe(tmp_path, tiny_qwen2))
    command = [sys.executable, "-m", "uft_ds", "reference", recipe]
    fills = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        )
        for _ in range(2)
    ]  # fmt: skip
    try:
        for fill in fills:
            out, err = fill.communicate(timeout=TIMEOUT_SECONDS)
            assert fill.returncode == 0, out + err
            assert "done: " in out
    finally:
        for fill in fills:
            if fill.poll() is None:
                os.killpg(fill.pid, signal.SIGKILL)
    assert not (tmp_path / "run").exists(), "the recipe's own output is not touched"
    again = uft("reference", recipe)
    assert "0 of 37 responses computed" in again.stdout, again.stdout + again.stderr
    assert "32 responses known; 16 compared with the reference itself" in again.stdout
    other = ("objective.beta=0.05", "train.lr=3e-3")
    result = uft("train", recipe, *other)
    assert result.returncode == 0, result.stdout + result.stderr
    assert computed(tmp_path / "run") == [0.0] * 4
    live = uft("train", recipe, *other, "reference.cache=false", f"output={tmp_path / 'live'}")
    assert live.returncode == 0, live.stdout + live.stderr
    assert computed(tmp_path / "live") == [8.0] * 4
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "live"), rel=1e-5)


def test_wrong_values_are_found_said_and_computed_again(tiny_qwen2: Path, tmp_path: Path) -> None:
    """A store whose numbers are whole but wrong: one file damaged, the rest off by a nat a token."""
    recipe = write_recipe(tmp_path, tiny_qwen2)
    first = uft("train", str(recipe), "train.steps=2", "train.evaluate_every=4")
    assert first.returncode == 0, first.stdout + first.stderr
    (folder,) = (tmp_path / "reference").iterdir()
    (path,) = folder.glob("*.safetensors")
    identity_table = path.read_bytes()
    store = _store_of(folder, path)
    right, _ = store.read()
    assert len(right) > 16
    path.unlink()
    store.write({key: value - 9.0 for key, value in right.items()})
    (folder / f"{'e' * 64}.safetensors").write_bytes(identity_table[:-5])
    second = uft("train", str(recipe), "train.steps=2", "train.evaluate_every=4", "--overwrite")
    assert second.returncode == 0, second.stdout + second.stderr
    assert f"{'e' * 64}.safetensors: its content is not what was written" in second.stdout
    assert "9 nats from the reference itself" in second.stdout
    assert losses(tmp_path / "run")[0] == pytest.approx(0.25, rel=1e-6)
    found, problems = store.read()
    assert problems == []
    assert found == pytest.approx(right, rel=1e-9)


def _store_of(folder: Path, path: Path) -> ReferenceStore:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        return ReferenceStore(folder, file.metadata()["reference"])
