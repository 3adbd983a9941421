"""Runs of a tiny model by the command, and what they leave: shared by tests of whole runs."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from forking import Program
from safetensors.torch import load_file

from uft_ds.recipe.settings import Settings, load_settings
from uft_ds.record.metrics_file import read_metrics
from uft_ds.run.settings import located

TIMEOUT_SECONDS = 280
STEPS = 6
OF_TIME = (
    "seconds",
    "tokens_per_second",
    "examples_per_second",
    "memory/peak_gib",
    "checkpoint/stall_seconds",
    "rollouts/seconds",
    "rollouts/tokens_per_second",
    "rollouts/generation_seconds",
    "rollouts/scoring_seconds",
)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_recipe(folder: Path, base: Path, **changes: Any) -> Path:
    """A recipe of four steps on a tiny model, with instruction and scored rows of uneven length.

    Args:
        changes: `train={...}` replaces a section, `train__lr=...` one key, also of a section that is replaced here.
    """
    instruction = [{"prompt": f"Say {i}", "response": "yes " * (1 + i % 5)} for i in range(16)]
    scored = [{"prompt": f"Rate {i}", "response": "no " * (1 + i % 3), "score": i % 3 / 2} for i in range(16)]
    tree: dict[str, Any] = {
        "name": "tiny",
        "model": {"base": str(base), "dtype": "float32"},
        "lora": {"rank": 4, "alpha": 8.0},
        "data": {
            "max_length": 64,
            "cache_dir": str(folder / "tokenized"),
            "sources": [
                {"format": "jsonl", "path": str(write_rows(folder / "instruction.jsonl", instruction))},
                {"format": "jsonl", "path": str(write_rows(folder / "scored.jsonl", scored))},
            ],
            "held_out": [{"format": "jsonl", "path": str(write_rows(folder / "held_out.jsonl", scored[:5]))}],
        },
        "objective": {"loss": "mse", "beta": 0.1},
        "train": {
            "examples_per_step": 8,
            "tokens_per_micro_batch": 128,  # two micro-batches a rank and step on two ranks
            "steps": 4,
            "lr": 1e-2,
            "evaluate_every": 2,
            "checkpoint_every": 2,
            "keep_checkpoints": 1,
        },
        "reference": {"cache_dir": str(folder / "reference")},
        "deepspeed": "zero3_cpu",
        "output": str(folder / "run"),
    }
    for key, value in sorted(changes.items(), key=lambda change: change[0].count("__")):
        node = tree
        *parents, leaf = key.split("__")
        for parent in parents:
            node = node[parent]
        node[leaf] = value
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def recipe_in(folder: Path, base: Path, **changes: Any) -> Path:
    """With a running reward shift: a checkpoint must hold that too; none where `changes` replace the objective."""
    folder.mkdir(parents=True, exist_ok=True)
    own = {
        "train__steps": STEPS,
        "train__checkpoint_every": 2,
        "train__keep_checkpoints": 2,
        "objective__reward_shift": "ema",
    }
    kept = {key: value for key, value in own.items() if key.partition("__")[0] not in changes}
    return write_recipe(folder, base, **(kept | changes))


def settings_of_run(recipe: Path, *overrides: str) -> Settings:
    """As a run begins with them."""
    return located(load_settings(str(recipe), overrides))


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command in its own process group, killed as a whole when it takes too long."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "1000", **environment},
    )
    try:
        out, err = process.communicate(timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        raise AssertionError(f"still running after {TIMEOUT_SECONDS} s\n{out}\n{err}") from None
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def forked(
    module: str, *arguments: str, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """`python -m MODULE` to its end, without the seconds of its imports; as `run` else."""
    process = program(module, *arguments, cwd=cwd, **environment)
    try:
        out, err = process.communicate(timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        out, err = process.said()
        raise AssertionError(f"still running after {TIMEOUT_SECONDS} s\n{out}\n{err}") from None
    finally:
        process.kill_group()
    assert process.returncode is not None
    return subprocess.CompletedProcess([module, *arguments], process.returncode, out, err)


def program(module: str, *arguments: str, cwd: Path | None = None, **environment: str) -> Program:
    """`python -m MODULE`, running."""
    return Program(
        module, *arguments, cwd=cwd, env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "1000", **environment}
    )


def uft(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command, forked; `uft_anew` has an interpreter of its own."""
    return forked("uft_ds", *arguments, **environment)


def uft_anew(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """As a user starts it, with all of its imports."""
    return run(sys.executable, "-m", "uft_ds", *arguments, **environment)


def started(recipe: Path, *options: str) -> Program:
    """`uft train`, in a process group of its own."""
    return program("uft_ds", "train", str(recipe), *options)


def killed_at(recipe: Path, step: int, *, one_rank: bool = False) -> None:
    """Train until a step's line is there, then SIGKILL the command and its ranks, or one rank alone.

    Returns when all have ended: a rank that is about to die may still complete a checkpoint.
    """
    folder = recipe.parent / "run"
    process = started(recipe)
    deadline = time.monotonic() + TIMEOUT_SECONDS
    try:
        while not (folder / "metrics.jsonl").exists() or not any(
            line["step"] >= step and "grad_norm" in line for line in read_metrics(folder / "metrics.jsonl")
        ):
            assert process.poll() is None, "it ended by itself"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        if one_rank:
            os.kill(random.choice(ranks_of(folder)), signal.SIGKILL)
            process.wait(timeout=TIMEOUT_SECONDS)
    finally:
        process.kill_group()
    wait_for_the_end_of(folder)


def ranks_of(folder: Path) -> list[int]:
    """Processes that train in this folder, by `uft train` or by a launcher."""
    found = []
    recipes = {str(folder / "recipe.yaml"), str(folder.parent / "recipe.yaml")}
    launchers = {"torch.distributed.run", "deepspeed.launcher.runner", "deepspeed.launcher.launch"}
    for process in psutil.process_iter(["cmdline"]):
        words = " ".join(process.info["cmdline"] or []).split()  # a forked rank's title is one text
        is_launcher = launchers & set(words)
        if "uft_ds.train" in words and recipes & set(words) and not is_launcher:
            found.append(process.pid)
    return sorted(found)


def wait_for_the_end_of(folder: Path) -> None:
    """Ranks die with their launcher, in a moment."""
    deadline = time.monotonic() + 30
    while ranks_of(folder):
        assert time.monotonic() < deadline, "orphans"
        time.sleep(0.05)


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]


def numbers(folder: Path) -> list[dict[str, Any]]:
    """All lines of metrics.jsonl, without what depends on the clock."""
    lines = [{k: v for k, v in line.items() if k not in OF_TIME} for line in read_metrics(folder / "metrics.jsonl")]
    return [line for line in lines if len(line) > 1]


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "latest" / "adapter" / "adapter_model.safetensors")


def assert_same_run(found: Path, expected: Path) -> None:
    assert numbers(found) == numbers(expected)
    ours, theirs = adapter(found), adapter(expected)
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert json.loads((found / "latest" / "trainer.json").read_text())["step"] == STEPS
    assert (found / "DONE").exists()


def assert_goes_on_from_its_middle(finished: Path, folder: Path) -> None:
    """A copy, in `folder`, of a run of six steps whose newest checkpoint is that of step 2 resumes to the same bits.

    finished: the folder of a recipe with its finished run.
    """
    shutil.copytree(finished / "run", folder, symlinks=True)
    (folder / "DONE").unlink()
    for name in ("step-000004", "step-000006"):
        shutil.rmtree(folder / "checkpoints" / name)
    result = uft("train", str(finished / "recipe.yaml"), "--resume", f"output={folder}")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "resuming from step-000002" in result.stdout
    assert numbers(folder) == numbers(finished / "run")
    assert_same_shards(folder, finished / "run")


def assert_same_shards(found: Path, expected: Path) -> None:
    """The newest checkpoints hold the same bits of weights and optimiser, rank by rank."""
    ours, theirs = (sorted((folder / "latest" / "optimizer").glob("*.safetensors")) for folder in (found, expected))
    assert [path.name for path in ours] == [path.name for path in theirs]
    for own, other in zip(ours, theirs, strict=True):
        one, two = load_file(own), load_file(other)
        assert set(one) == set(two)
        assert all(torch.equal(one[name], two[name]) for name in two)
