"""The batch scripts on a real Slurm of two nodes: training, and everything that ends a job on the way.

Invariant 4 across jobs: whatever ended the first ones, the run in the end is the one that was never touched.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from cluster import Cluster, cluster
from runs import adapter, numbers
from tiny import build_tiny_model

from uft_ds.checkpoint.folder import newest_whole, step_of
from uft_ds.record.metrics_file import read_metrics

pytestmark = pytest.mark.long

SLURM = Path(__file__).parents[2] / "slurm"
STEPS = 40


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="sl-"))  # unix sockets lie below: a short path
    folder.chmod(0o755)  # munged insists
    with cluster(folder / "s", nodes=2, gpus=0) as up:
        yield up
    folder.rmdir()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("base"), "qwen2", tied=True)


def write_recipe(folder: Path, base: Path, **train: Any) -> Path:
    """A run that lasts some seconds and saves every eighth step."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": f"Rate {i}", "response": "no " * (1 + i % 3), "score": i % 3 / 2} for i in range(48)]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "name": "tiny",
        "model": {"base": str(base), "dtype": "float32"},
        "lora": {"rank": 4, "alpha": 8.0},
        "data": {
            "max_length": 64,
            "cache_dir": str(folder / "tokenized"),
            "sources": [{"format": "jsonl", "path": str(data)}],
        },
        "objective": {"loss": "mse", "beta": 0.1},
        "train": {
            "examples_per_step": 8, "tokens_per_micro_batch": 64, "steps": STEPS, "lr": 1e-2,
            "checkpoint_every": 8, "evaluate_every": 8,
        } | train,
        "reference": {"cache_dir": str(folder / "reference")},
        "tracking": [],
        "deepspeed": "zero3_cpu",
        "output": str(folder / "run"),
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def submit(slurm: Cluster, recipe: Path, *overrides: str, **settings: str) -> tuple[str, Path]:
    """(job, its log): two nodes of one rank each, at the scripts' own settings but for what a CPU has not."""
    folder = recipe.parent
    given = {"UFT_RANKS_PER_NODE": "1", **settings}
    export = ",".join(["ALL", *(f"{name}={value}" for name, value in given.items())])
    job = slurm.submit(
        "--nodes=2", "--gpus-per-node=0", "--mem=2000", f"--export={export}", SLURM / "uft_qwen32b.sh",
        recipe, *overrides, cwd=folder,
    )  # fmt: skip
    return job, folder / f"uft-{job}.out"


def last_step(run: Path) -> int:
    path = run / "metrics.jsonl"
    lines = read_metrics(path) if path.exists() else []
    return max((line["step"] for line in lines if "grad_norm" in line), default=0)


def ranks_of(recipe: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "uft_ds.train" in words and str(recipe) in words and words[2:4] == ["-m", "uft_ds.train"]:
            found.append(process)
    return sorted(found, key=lambda process: process.pid)


def assert_same_run(found: Path, expected: Path) -> None:
    assert (found / "DONE").exists()
    assert numbers(found) == numbers(expected)
    ours, theirs = adapter(found), adapter(expected)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def restarts(slurm: Cluster, job: str) -> int:
    return int(slurm.field(job, "Restarts"))


@pytest.fixture(scope="module")
def unbroken(slurm: Cluster, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job that nothing happened to."""
    recipe = write_recipe(tmp_path_factory.mktemp("unbroken"), base)
    job, log = submit(slurm, recipe)
    assert slurm.wait(job, log=log) == "COMPLETED", log.read_text()
    return recipe.parent / "run"


def test_a_job_trains_on_all_its_nodes(slurm: Cluster, base: Path, tmp_path: Path) -> None:
    """Four ranks on two nodes, two of each by default without a GPU; the log says revision, environment and resolved
    recipe; the master has a host's name."""
    recipe, run = write_recipe(tmp_path, base), tmp_path / "run"
    job, log = submit(slurm, recipe, UFT_RANKS_PER_NODE="")
    assert slurm.wait(job, log=log) == "COMPLETED", log.read_text()
    said = log.read_text()
    assert "every log-ratio is 0.0 nats" in said
    assert re.search(r"=== master node1:\d+, 2 nodes x 2 ranks", said)
    assert re.search(r"=== uft_ds \S+, git [0-9a-f]{40}", said)
    assert "examples_per_step: 8" in said
    assert sorted(path.name for path in run.glob("log-rank*.txt")) == [f"log-rank{i}.txt" for i in range(4)]
    assert {line["step"] for line in numbers(run)} == set(range(1, STEPS + 1))
    assert not (Path(os.environ.get("TMPDIR", "/tmp")) / f"uft-{job}-0").exists(), "built kernels are cleared away"


def test_a_job_comes_back_whatever_has_ended_it(slurm: Cluster, unbroken: Path, base: Path, tmp_path: Path) -> None:
    """Five ends, one after the other: a signal while the launchers start, the time limit, a more urgent job, a rank
    that is killed, and a node that is lost. In the end it is the run that nothing happened to."""
    recipe, run = write_recipe(tmp_path, base), tmp_path / "run"
    job, log = submit(slurm, recipe)

    # Long before a rank listens.
    slurm.until(lambda: log.exists() and "=== recipe" in log.read_text(), log=log)
    slurm.run("scancel", "--batch", "--signal=USR1", job)
    slurm.until(lambda: restarts(slurm, job) == 1, log=log)
    assert "User defined signal" not in log.read_text()

    # USR1 as `--signal=B:USR1@600` sends it: saved at a step that no period falls on.
    slurm.until(lambda: last_step(run) >= 4, log=log)
    slurm.run("scancel", "--batch", "--signal=USR1", job)
    slurm.until(lambda: restarts(slurm, job) == 2, log=log)
    stopped = re.search(r"stopped by SIGUSR1 after step (\d+) of", log.read_text())
    assert stopped is not None
    assert "=== outcome 85" in log.read_text()

    # SIGTERM, ten seconds of grace: saved within them.
    slurm.until(lambda: last_step(run) >= 12, log=log)
    assert f"resuming from step-{int(stopped[1]):06d}" in log.read_text()
    urgent = slurm.submit(
        "--partition=urgent", "--nodes=2", "--exclusive", f"--output={tmp_path}/urgent.out", "--wrap", "sleep 1",
        cwd=tmp_path,
    )  # fmt: skip
    assert slurm.wait(urgent, log=log) == "COMPLETED"
    slurm.until(lambda: restarts(slurm, job) == 3, log=log)
    assert "stopped by SIGTERM after step" in log.read_text()

    # SIGKILL of one of two: the other is ended, and the newest checkpoint is used.
    slurm.until(lambda: last_step(run) >= 25, log=log)
    ranks = ranks_of(recipe)
    assert len(ranks) == 2
    os.kill(ranks[1].pid, signal.SIGKILL)
    slurm.until(lambda: restarts(slurm, job) == 4, log=log)
    assert "=== ended 1 times" not in log.read_text(), "there was a new checkpoint"

    # As if its power had gone: Slurm requeues the job, which goes on once the node is back.
    slurm.until(lambda: last_step(run) >= 33, log=log)
    assert "resuming from step-000024" in log.read_text()
    slurm.node("kill-node", "node2")
    try:
        slurm.until(lambda: restarts(slurm, job) == 5, log=log)
    finally:
        slurm.node("start-node", "node2")
    assert slurm.wait(job, log=log) == "COMPLETED", log.read_text()
    assert_same_run(run, unbroken)


def test_a_cancelled_job_stays_cancelled(slurm: Cluster, unbroken: Path, base: Path, tmp_path: Path) -> None:
    """Saved on the way out, and not requeued. Another recipe is refused, there and where a run is done: failed, and not
    started again."""
    recipe = write_recipe(tmp_path, base, steps=4000)
    job, log = submit(slurm, recipe)
    slurm.until(lambda: last_step(tmp_path / "run") >= 10, log=log)
    slurm.run("scancel", job)
    assert slurm.wait(job, log=log) == "CANCELLED"
    time.sleep(8)  # a requeued job would be back by now
    assert slurm.field(job, "JobState") == "CANCELLED"
    assert restarts(slurm, job) == 0
    newest, _ = newest_whole(tmp_path / "run")
    assert newest is not None
    assert step_of(newest) == last_step(tmp_path / "run")
    assert not ranks_of(recipe)
    assert json.loads((tmp_path / "run" / "status.json").read_text())["exit_code"] == 85
    for changed in (recipe, unbroken.parent / "recipe.yaml"):
        job, log = submit(slurm, changed, "train.lr=0.02")
        assert slurm.wait(job, log=log) == "FAILED", log.read_text()
        assert restarts(slurm, job) == 0
        assert "train.lr: 0.02 now, 0.01 when the run began" in log.read_text()
    assert not list(tmp_path.glob(".uft-*"))


@pytest.mark.parametrize(
    ("override", "message"),
    [("train.lr=-1", "train.lr: "), ("data.sources.0.path=nowhere.jsonl", "nowhere.jsonl")],
    ids=["recipe", "data"],
)
def test_bad_input_is_never_started_again(
    slurm: Cluster, base: Path, tmp_path: Path, override: str, message: str
) -> None:
    """Exit code 2, one message, no restart, no folder."""
    recipe = write_recipe(tmp_path, base)
    job, log = submit(slurm, recipe, override)
    assert slurm.wait(job, log=log) == "FAILED"
    assert restarts(slurm, job) == 0
    assert message in log.read_text()
    assert not (tmp_path / "run").exists()


def test_a_run_that_crashes_again_and_again_is_given_up(slurm: Cluster, base: Path, tmp_path: Path) -> None:
    """Bounded by ends without a new checkpoint in between: one before the run has a folder, one that has made the
    checkpoint of step 0, two that have made none."""
    recipe = write_recipe(tmp_path, base, steps=4000, checkpoint_every=4000)
    job, log = submit(slurm, recipe, UFT_MAX_CRASHES="2")
    for crash in range(4):
        slurm.until(
            lambda crash=crash: (crash == 0 or last_step(tmp_path / "run") >= 2) and len(ranks_of(recipe)) == 2, log=log
        )
        assert (tmp_path / "run").exists() == (crash > 0)
        os.kill(ranks_of(recipe)[0].pid, signal.SIGKILL)
        # Of the first one it may be 85: before it trains, a rank that its launcher ends has been asked to stop.
        slurm.until(lambda crash=crash: log.read_text().count("=== outcome ") == crash + 1, log=log)
        slurm.until(lambda: not ranks_of(recipe), log=log)
        if crash > 0:
            (tmp_path / "run" / "metrics.jsonl").write_text("")  # so that steps are those of the next start
    assert slurm.wait(job, log=log) == "FAILED"
    assert restarts(slurm, job) == 3
    assert re.findall(r"=== ended (\d) times without a new checkpoint", log.read_text()) == ["1", "1", "2"]
    assert not list(tmp_path.glob(".uft-*"))


def test_a_sweep_is_an_array_and_a_table(slurm: Cluster, base: Path, tmp_path: Path) -> None:
    """Learning rate times beta; the last job writes one table of all; tokens and the reference are shared.

    A member that is stopped comes back, and it alone: the last one, whose number is that of the whole array.
    """
    recipe = write_recipe(tmp_path, base)
    slurm_options = {"UFT_SBATCH": "--gpus-per-node=0 --mem=2000", "UFT_SWEEP_PARALLEL": "2", "UFT_RANKS_PER_NODE": "1"}
    started = Cluster(slurm.state, {**slurm.environment, **slurm_options, "PWD": str(tmp_path)})
    done = subprocess.run(
        ["bash", SLURM / "sweep.sh", recipe, "--grid", "train.lr=[0.01,0.003]", "--grid", "objective.beta=[0.1,0.3]"],
        capture_output=True, text=True, env=started.environment, cwd=tmp_path, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = re.search(r"4 jobs: array (\d+); then the table: job (\d+)", done.stdout)
    assert found is not None, done.stdout
    member, run = f"{found[1]}_3", tmp_path / "run-sweep" / "tiny-lr=0.003-beta=0.3"
    slurm.until(lambda: last_step(run) >= 4, log=tmp_path / f"uft-sweep-{member}.out", seconds=400)
    slurm.run("scancel", "--batch", "--signal=USR1", member)
    log = tmp_path / f"uft-table-{found[2]}.out"
    assert slurm.wait(found[2], log=log, seconds=400) == "COMPLETED", log.read_text()
    table = (tmp_path / "run-sweep" / "table.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in table[1:]] == [
        f"tiny-lr={lr}-beta={beta}" for lr in ("0.01", "0.003") for beta in ("0.1", "0.3")
    ]
    assert all(",done," in line for line in table[1:])
    assert [restarts(slurm, f"{found[1]}_{number}") for number in range(4)] == [0, 0, 0, 1]
    assert len(list((tmp_path / "tokenized").glob("[0-9a-f]*"))) == 1
    assert "tiny-lr=0.01-beta=0.1" in log.read_text()
    assert not list(tmp_path.glob(".uft-*")), "nothing is left"
