"""Jobs of one serving node and two that train, on a real Slurm of three nodes; a stand-in for vLLM answers.

Whatever befalls the server or the job on the way, the run in the end is the one that was never touched.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from cluster import Cluster, cluster
from runs import adapter, numbers, write_rows
from test_jobs import last_step, restarts, write_recipe
from tiny import build_tiny_model

from uft_ds.checkpoint.folder import newest_whole

pytestmark = pytest.mark.long

HERE = Path(__file__).parent
SLURM = HERE.parents[1] / "slurm"
SERVER = HERE / "stand_in_vllm.py"
STEPS = 14
SECONDS = 600.0
"""The longest that a job may take: its checks, its server and its ranks start one after the other."""


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="sl-"))  # unix sockets lie below: a short path
    folder.chmod(0o755)  # munged insists
    with cluster(folder / "s", nodes=3, gpus=0) as up:
        yield up
    folder.rmdir()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("base"), "qwen2", tied=True)


def online_recipe(folder: Path, base: Path) -> Path:
    """Half of each step are answers by a server, at an address that the job must replace."""
    path = write_recipe(folder, base, steps=STEPS, checkpoint_every=4, evaluate_every=4)
    tree = yaml.safe_load(path.read_text())
    prompts = write_rows(folder / "prompts.jsonl", [{"prompt": f"Say {i}"} for i in range(24)])
    tree["data"]["sources"][0]["share"] = 0.5
    tree["data"]["sources"] += [
        {
            "format": "prompts",
            "path": str(prompts),
            "answers": 2,
            "score_by": "regex:[aeiou]",
            "share": 0.5,
        }
    ]
    tree["objective"]["center"] = "prompt"
    tree["generator"] = {"by": "vllm", "url": "http://127.0.0.1:9", "max_new_tokens": 6}
    path.write_text(yaml.safe_dump(tree))
    return path


def submit(slurm: Cluster, recipe: Path, *, nodes: int = 3, **settings: str) -> tuple[str, Path]:
    """(job, its log): a rank on each node but the first one. The server listens on that node's address alone."""
    given = {
        "UFT_VLLM": f"{sys.executable} {SERVER}",
        "UFT_VLLM_FLAGS": "--host 127.0.0.11",
        "UFT_RANKS_PER_NODE": "1",
        **settings,
    }
    export = ",".join(["ALL", *(f"{name}={value}" for name, value in given.items())])
    job = slurm.submit(
        f"--nodes={nodes}", "--gpus-per-node=0", "--mem=2000", f"--export={export}", SLURM / "online.sh", recipe,
        cwd=recipe.parent,
    )  # fmt: skip
    return job, recipe.parent / f"uft-online-{job}.out"


def server_log(job_log: Path) -> Path:
    return job_log.with_name(f"uft-vllm-{job_log.stem.removeprefix('uft-online-')}.log")


def servers(job_log: Path) -> list[psutil.Process]:
    """Those of a job that run."""
    ports = set(re.findall(r"=== server on node1 port (\d+)", job_log.read_text()))
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if str(SERVER) in words and ports & set(words):
            found.append(process)
    return found


def assert_same_run(found: Path, expected: Path) -> None:
    """Also if a step after the last checkpoint was read from the record."""
    assert (found / "DONE").exists()
    of_found, of_expected = (
        [{name: value for name, value in line.items() if name != "rollouts/replayed"} for line in numbers(run)]
        for run in (found, expected)
    )
    assert of_found == of_expected
    ours, theirs = adapter(found), adapter(expected)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def assert_ended(log: Path) -> None:
    """Nothing is left of a job but its logs."""
    assert servers(log) == []
    assert not list(log.parent.glob(".uft-*"))


@pytest.fixture(scope="module")
def unbroken(slurm: Cluster, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job that nothing happened to."""
    recipe = online_recipe(tmp_path_factory.mktemp("unbroken"), base)
    job, log = submit(slurm, recipe)
    assert slurm.wait(job, log=log, seconds=SECONDS) == "COMPLETED", log.read_text()
    return recipe.parent / "run"


def test_one_node_serves_and_the_others_train(unbroken: Path) -> None:
    """The server is started as the recipe needs it, before the ranks, and is ended with the job."""
    (log,) = unbroken.parent.glob("uft-online-*.out")
    said = log.read_text()
    assert re.search(r"=== master node2:\d+, 2 nodes x 1 ranks", said)
    assert said.index("=== the server is ready") < said.index("every log-ratio is 0.0 nats")
    started = server_log(log).read_text()
    (line,) = [line for line in started.splitlines() if line.startswith("===")]
    assert "--dtype float32 --max-model-len 64 --enable-lora --max-lora-rank 8 --max-loras 1 --max-cpu-loras 2" in line
    assert sorted(path.name for path in unbroken.glob("log-rank*.txt")) == ["log-rank0.txt", "log-rank1.txt"]
    assert len(list((unbroken / "rollouts" / "answers").glob("*.jsonl"))) == STEPS
    assert last_step(unbroken) == STEPS
    assert_ended(log)


def test_whatever_ends_a_server_or_its_job_costs_nothing(
    slurm: Cluster, unbroken: Path, base: Path, tmp_path: Path
) -> None:
    """A server that is killed, one that has been killed too often, and the time limit, one after the other: the same
    bits in the end."""
    recipe, run = online_recipe(tmp_path, base), tmp_path / "run"
    job, log = submit(slurm, recipe, UFT_VLLM_RESTARTS="1")

    # It is started again while the run waits, which gives it the adapter again.
    slurm.until(lambda: last_step(run) >= 2, log=log, seconds=SECONDS)
    (server,) = servers(log)
    os.kill(server.pid, signal.SIGKILL)
    slurm.until(lambda: last_step(run) >= 5, log=log, seconds=SECONDS)
    assert restarts(slurm, job) == 0
    assert "the server has ended with exit code 137; restart 1 of 1" in log.read_text()
    assert "answers again after" in log.read_text()
    assert server_log(log).read_text().count("serving http://127.0.0.11:") == 2

    # The run saves and the job is requeued, as after a crash.
    (server,) = servers(log)
    os.kill(server.pid, signal.SIGKILL)
    slurm.until(lambda: restarts(slurm, job) == 1, log=log, seconds=SECONDS)
    assert "after 1 restarts (UFT_VLLM_RESTARTS): the run is ended" in log.read_text()

    # USR1 as before the limit: the run saves, and the job is requeued with another server.
    slurm.until(lambda: last_step(run) >= 9, log=log, seconds=SECONDS)
    assert "resuming from step-" in log.read_text()
    slurm.run("scancel", "--batch", "--signal=USR1", job)
    assert slurm.wait(job, log=log, seconds=SECONDS) == "COMPLETED", log.read_text()
    assert restarts(slurm, job) == 2
    assert re.search(r"stopped by SIGUSR1 after step (\d+) of", log.read_text())
    assert log.read_text().count("=== the server is ready") == 3
    assert_same_run(run, unbroken)
    assert_ended(log)


def test_a_cancelled_job_takes_its_server_along(slurm: Cluster, base: Path, tmp_path: Path) -> None:
    """Saved on the way out, and not requeued."""
    recipe = online_recipe(tmp_path, base)
    job, log = submit(slurm, recipe)
    slurm.until(lambda: last_step(tmp_path / "run") >= 2, log=log, seconds=SECONDS)
    slurm.run("scancel", job)
    assert slurm.wait(job, log=log, seconds=SECONDS) == "CANCELLED"
    slurm.until(lambda: servers(log) == [], log=log, seconds=SECONDS)
    assert newest_whole(tmp_path / "run")[0] is not None
    assert restarts(slurm, job) == 0


@pytest.mark.parametrize(
    ("nodes", "settings", "code", "message"),
    [
        (2, {"UFT_VLLM_FLAGS": "--no-such-flag"}, "1:0", "unrecognized arguments: --no-such-flag"),
        (2, {"UFT_VLLM": "no-such-program"}, "2:0", "no-such-program is no program"),
        (1, {}, "2:0", "--nodes=1: online.sh needs 2 or more"),
    ],
    ids=["flags", "program", "nodes"],
)
def test_without_a_server_nothing_is_trained(
    slurm: Cluster, base: Path, tmp_path: Path, nodes: int, settings: dict[str, str], code: str, message: str
) -> None:
    """The job fails with the reason in its log, and is not started again."""
    recipe = online_recipe(tmp_path, base)
    job, log = submit(slurm, recipe, nodes=nodes, **settings)
    assert slurm.wait(job, log=log, seconds=SECONDS) == "FAILED"
    assert slurm.field(job, "ExitCode") == code
    assert restarts(slurm, job) == 0
    assert message in log.read_text()
    assert not (tmp_path / "run").exists()
    assert_ended(log)
