"""Checkpoints on real ranks: whole or absent, what they hold, what a failed write leaves, which are kept."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path
from typing import Any

import needs
import numpy as np
import pytest
import torch
from engines import Heard, accumulate, at, trained, writer_of
from ranks import run_on_ranks
from safetensors.torch import load_file
from tiny import build_tiny_model
from toy import UFT, toy_step

from uft_ds.checkpoint.folder import checkpoints_of, newest_whole
from uft_ds.checkpoint.generators import NAMES, generator_states, restore_generators
from uft_ds.checkpoint.manifest import manifest_problem
from uft_ds.checkpoint.shards import Shards
from uft_ds.checkpoint.state import read_position
from uft_ds.data.packing import rank_micro_batches
from uft_ds.errors import UserError
from uft_ds.known.cache import Known


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("base"), "qwen2", tied=False)


def saved_twice(base: Path, folder: Path) -> Any:
    engine, heard = trained(base), Heard()
    trainable = sum(p.ds_numel for p in engine.module.parameters() if p.requires_grad)
    writer = writer_of(engine, folder, heard)
    known = Known.of_reference("cached", {bytes([i]) * 16: float(-i) for i in range(3)}, identity="0" * 64)
    waited = [writer.start(at(step), known) for step in (1, 2)]
    before = [path.name for path in checkpoints_of(folder)]
    writer.finish()
    with engine.gathered_trainable() as named:
        weights = {name: tensor.clone() for name, tensor in named.items()}
    return waited, before, heard.said, trainable, weights


def test_a_checkpoint_holds_adapter_optimiser_generators_and_position(base: Path, tmp_path: Path) -> None:
    """Each rank its own part, nothing of the frozen base, a manifest that fits, and no temporary folder."""
    first, second = run_on_ranks(saved_twice, 2, base, tmp_path)
    waited, before, said, trainable, weights = first
    assert before == ["step-000001"] == second[1], "the second save has waited for the first"
    assert all(seconds > 0 for seconds in waited)
    assert not said
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000001", "step-000002"]
    newest, problems = newest_whole(tmp_path)
    assert newest is not None
    assert not problems
    assert (tmp_path / "latest").resolve() == newest.resolve()
    files = {str(path.relative_to(newest)) for path in newest.rglob("*") if path.is_file()}
    assert files == {
        "manifest.json", "trainer.json", "reference.safetensors", "adapter/adapter_model.safetensors",
        "adapter/adapter_config.json", "optimizer/rank-00000-of-00002.safetensors",
        "optimizer/rank-00001-of-00002.safetensors",
    }  # fmt: skip
    assert set(json.loads((newest / "manifest.json").read_text())["files"]) == files - {"manifest.json"}
    assert read_position(newest) == at(2)
    adapter = load_file(newest / "adapter" / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in adapter.values()) == trainable
    for name, tensor in weights.items():
        assert torch.equal(adapter[name.removeprefix("policy.").replace(".default", "")], tensor)
    shards = Shards(newest / "optimizer")
    numel = {name: int(np.prod(shape)) for name, shape in shards.shapes.items()}
    assert sum(numel.values()) == trainable
    for name, tensor in weights.items():
        assert torch.equal(shards.read(name, "master", 0, numel[name]).view(shards.shapes[name]), tensor)
        assert shards.read(name, "exp_avg_sq", 0, numel[name]).any()
    assert set(shards.own(1, NAMES)) >= {"rng:torch", "rng:python and numpy"}
    stored = [tensor for file in newest.rglob("*/*.safetensors") for tensor in load_file(file).values()]
    numbers = sum(tensor.numel() for tensor in stored if tensor.dtype == torch.float32)
    assert numbers == 4 * trainable, "weights, masters and two moments, once each over all ranks"


def trains_on_meanwhile(base: Path, folder: Path) -> Any:
    """A write that lasts until a step has been made."""
    import threading

    from uft_ds.checkpoint import writer as save

    engine, may_write = trained(base), threading.Event()
    write = save.write_snapshot
    save.write_snapshot = lambda *args: may_write.wait(60) and write(*args)
    with engine.gathered_trainable() as named:
        before = {name: tensor.clone() for name, tensor in named.items()}
    writer = writer_of(engine, folder, Heard())
    writer.start(at(1), Known.of_reference("lockstep"))
    assert writer.poll() is None
    started_early = not list(folder.rglob("*.safetensors"))
    batches = rank_micro_batches(toy_step(), tokens_per_micro_batch=64, rank=engine.rank, world_size=engine.world_size)
    accumulate(engine, batches, UFT)
    engine.step(1e-2)
    with engine.gathered_trainable() as named:
        moved = any(not torch.equal(before[name], tensor) for name, tensor in named.items())
    may_write.set()
    writer.finish()
    return started_early, moved, before


def test_training_goes_on_while_a_checkpoint_is_written(base: Path, tmp_path: Path) -> None:
    """`start` returns before anything is on the disk, and a step in between changes nothing of what is written."""
    started_early, moved, before = run_on_ranks(trains_on_meanwhile, 2, base, tmp_path)[0]
    assert started_early
    assert moved
    newest, _ = newest_whole(tmp_path)
    assert newest is not None
    adapter, shards = load_file(newest / "adapter" / "adapter_model.safetensors"), Shards(newest / "optimizer")
    for name, tensor in before.items():
        assert torch.equal(adapter[name.removeprefix("policy.").replace(".default", "")], tensor)
        assert torch.equal(shards.read(name, "master", 0, tensor.numel()).view(tensor.shape), tensor)


def a_write_that_fails(base: Path, folder: Path) -> Any:
    engine, heard = trained(base), Heard()
    writer = writer_of(engine, folder, heard)
    none = Known.of_reference("lockstep")
    writer.start(at(1), none)
    writer.finish()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if engine.rank == 1:  # the file system's answer to what is too large
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    writer.start(at(2), none)
    problem = writer.poll(wait=True)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    after = [path.name for path in folder.joinpath("checkpoints").iterdir()]
    torch.distributed.barrier()
    writer.start(at(3), none)
    writer.finish()
    return problem, after, heard.said


def test_a_write_that_fails_leaves_the_older_checkpoint(base: Path, tmp_path: Path) -> None:
    """Every rank knows, it is said with the file's name, nothing is half-written, and the next one is whole."""
    results = run_on_ranks(a_write_that_fails, 2, base, tmp_path)
    for problem, _, said in results:
        assert str(problem).startswith("rank 1: ")
        assert "rank-00001-of-00002.safetensors" in str(problem)
        assert said == [f"checkpoint step-000002 could not be written ({problem}); the last one is step-000001"]
    assert results[0][1] == ["step-000001"]
    assert [path.name for path in checkpoints_of(tmp_path)] == ["step-000003", "step-000001"]
    assert all(manifest_problem(path) is None for path in checkpoints_of(tmp_path))


def on_a_full_disk(base: Path, folder: Path) -> Any:
    engine, heard = trained(base), Heard()
    writer, none = writer_of(engine, folder, heard), Known.of_reference("lockstep")
    writer.start(at(1), none)
    writer.finish()
    if engine.rank == 0:
        with (folder / "filler").open("wb") as file:
            file.write(bytes(max(0, shutil.disk_usage(folder).free - 200_000)))
    torch.distributed.barrier()
    writer.start(at(2), none)
    try:
        writer.finish()
    except UserError as error:
        return str(error), heard.said
    return "", heard.said


def test_a_full_disk_leaves_the_older_checkpoint(base: Path, tmp_path: Path) -> None:
    """A real one: a small tmpfs. The last checkpoint that cannot be written ends the run with the file's name."""
    with needs.tmpfs(tmp_path / "small", "4m") as folder:
        for problem, said in run_on_ranks(on_a_full_disk, 2, base, folder):
            assert problem.startswith("the last checkpoint could not be written: rank ")
            assert "No space left on device" in problem or "os error 28" in problem
            assert said[-1].endswith("the last one is step-000001")
        assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-000001"]
        assert manifest_problem(folder / "checkpoints" / "step-000001") is None


def kept(base: Path, folder: Path, best: str | None) -> list[str]:
    engine, heard = trained(base), Heard()
    writer, none = writer_of(engine, folder, heard, keep=1, best=best), Known.of_reference("lockstep")
    values = {1: 0.5, 2: 0.3, 3: 0.4, 4: None, 5: 0.6}
    for step, value in values.items():
        writer.start(at(step), none)
        if engine.rank == 0:
            with (folder / "metrics.jsonl").open("a") as file:
                line = {"step": step, "held_out/loss": value, "held_out/rank_correlation/score": value}
                file.write(json.dumps(line) + "\n")
        writer.poll(wait=True)
    return [path.name for path in checkpoints_of(folder)]


@pytest.mark.parametrize(
    ("best", "expected"),
    [
        pytest.param(None, [5], marks=pytest.mark.long),
        ("held_out/loss", [5, 2]),
        ("held_out/rank_correlation/score", [5]),
        pytest.param("held_out/other", [5], marks=pytest.mark.long),
    ],
)
def test_the_newest_and_the_best_are_kept(base: Path, tmp_path: Path, best: str | None, expected: list[int]) -> None:
    """Of a loss the lowest is best, of a correlation the highest."""
    assert run_on_ranks(kept, 1, base, tmp_path, best)[0] == [f"step-{step:06d}" for step in expected]


def test_generators_come_back() -> None:
    """torch's, numpy's and Python's draw the same numbers again."""
    import random

    def draw() -> list[float]:
        return [random.random(), float(np.random.random()), float(torch.rand(())), random.gauss(0, 1)]

    draw()
    states = generator_states()
    expected = draw()
    draw()
    restore_generators(states)
    assert draw() == expected
