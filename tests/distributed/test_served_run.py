"""Whole online runs whose answers come from a server: a stand-in for vLLM that answers by Hugging Face's forward."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from runs import TIMEOUT_SECONDS, program, uft, write_recipe, write_rows
from stand_in_server import ALWAYS, StandIn, stand_in

from uft_ds.record.metrics_file import read_metrics

STEPS, ANSWERS = 3, 3
SCORER = "def score(messages, response, meta):\n    return sum(map(ord, response)) % 11 / 10\n"


@pytest.fixture(scope="module")
def server(tiny_qwen2: Path) -> Iterator[StandIn]:
    with stand_in(tiny_qwen2, slow_seconds=0.05) as running:
        yield running


@pytest.fixture(autouse=True)
def well(server: StandIn) -> Iterator[None]:
    """Each test begins with a server that has no fault, no adapter, and no past."""
    server.faults.clear()
    server.adapters.clear()
    server.asked.clear()
    yield
    server.faults.clear()


def served_recipe(folder: Path, base: Path, server: StandIn, **generator: Any) -> Path:
    """Half of each step are answers by the server, half are rows of data."""
    (folder / "scorer_of_runs.py").write_text(SCORER)
    recipe = write_recipe(folder, base, train__steps=STEPS, train__checkpoint_every=1)
    tree = yaml.safe_load(recipe.read_text())
    tree["name"] = folder.name
    tree["data"]["sources"][1] = {
        "format": "prompts",
        "path": str(write_rows(folder / "prompts.jsonl", [{"prompt": f"Say {i}"} for i in range(9)])),
        "answers": ANSWERS,
        "score_by": {"by": "code:scorer_of_runs:score", "workers": 1},
        "share": 0.5,
    }
    tree["generator"] = {"by": "vllm", "url": server.url, "max_new_tokens": 8, **generator}
    recipe.write_text(yaml.safe_dump(tree))
    return recipe


def train(recipe: Path, *options: str) -> Any:
    return uft("train", str(recipe), *options, PYTHONPATH=str(recipe.parent))


def steps_of(run: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(run / "metrics.jsonl") if "grad_norm" in line]


def versions(server: StandIn) -> list[str]:
    """Names of the adapters that runs have loaded; not those of a server's examination."""
    names = [body["lora_name"] for body in server.bodies("/v1/load_lora_adapter")]
    return [name for name in names if "-check-" not in name]


def adapter_of(folder: Path) -> bytes:
    return (folder / f"run/checkpoints/step-{STEPS:06d}/adapter/adapter_model.safetensors").read_bytes()


class Unbroken(NamedTuple):
    """A run by a server without a fault. versions, left: adapters that it has loaded, and that it has left there."""

    folder: Path
    versions: list[str]
    left: dict[str, Any]


@pytest.fixture(scope="module")
def unbroken(server: StandIn, tiny_qwen2: Path, tmp_path_factory: pytest.TempPathFactory) -> Unbroken:
    folder = tmp_path_factory.mktemp("unbroken")
    result = train(served_recipe(folder, tiny_qwen2, server))
    assert result.returncode == 0, result.stdout + result.stderr
    return Unbroken(folder, versions(server), dict(server.adapters))


@pytest.mark.long
def test_a_run_trains_on_a_servers_answers(unbroken: Unbroken) -> None:
    """By the ids that it gave, with log-probs that agree with our own in every step, by a version of each step."""
    run = unbroken.folder / "run"
    lines = steps_of(run)
    assert len(lines) == STEPS
    assert all(0 < line["rollouts/served_gap"] < 1e-4 for line in lines)
    assert all(abs(line["rollouts/served_gap_mean"]) < 1e-5 for line in lines)
    assert len(unbroken.versions) == len(set(unbroken.versions)) == STEPS
    assert unbroken.left == {}
    recorded = [
        answer
        for path in sorted((run / "rollouts" / "answers").glob("*.jsonl"))
        for line in path.read_text().splitlines()
        for answer in json.loads(line)["answers"]
    ]
    assert sum(line["responses/score"] for line in lines) == len(recorded)
    assert all(answer["logp"] < 0 for answer in recorded)
    assert list(unbroken.folder.glob(".run.server-check*")) == []


@pytest.mark.long
def test_a_server_that_is_started_again_meanwhile_is_given_the_adapter_again(
    server: StandIn, unbroken: Unbroken, tiny_qwen2: Path, tmp_path: Path
) -> None:
    """The same adapter is trained as by a server that never stopped."""
    server.faults["restarts"] = 2
    result = train(served_recipe(tmp_path, tiny_qwen2, server))
    assert result.returncode == 0, result.stdout + result.stderr
    assert adapter_of(unbroken.folder) == adapter_of(tmp_path)


def train_with_fault(recipe: Path, server: StandIn, fault: str, *options: str) -> tuple[int, str]:
    """Train; the server's fault begins once it has the adapter of the second step. Its exit code and errors."""
    process = program("uft_ds", "train", str(recipe), *options, PYTHONPATH=str(recipe.parent))
    deadline = time.monotonic() + TIMEOUT_SECONDS
    try:
        while len(versions(server)) < 2:
            assert process.poll() is None, process.said()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        server.faults[fault] = ALWAYS
        _, errors = process.communicate(TIMEOUT_SECONDS)
    finally:
        process.kill_group()
    assert process.returncode is not None
    return process.returncode, errors


@pytest.mark.long
def test_a_server_that_answers_by_another_version_ends_the_run(
    server: StandIn, tiny_qwen2: Path, tmp_path: Path
) -> None:
    """With exit code 3; the step is in no checkpoint, and its record is put aside."""
    recipe = served_recipe(tmp_path, tiny_qwen2, server)
    code, errors = train_with_fault(recipe, server, "stale", "train.lr=0.05", "train.steps=8")
    assert code == 3, errors
    assert "The policy that answered is not the one that is trained" in errors
    newest = max(int(path.name[-6:]) for path in (tmp_path / "run" / "checkpoints").glob("step-*"))
    assert newest >= 1
    recorded = sorted(path.name for path in (tmp_path / "run" / "rollouts" / "steps").glob("??????.json"))
    assert recorded == [f"{n:06d}.json" for n in range(1, newest + 1)]


@pytest.mark.long
def test_a_lost_server_costs_no_step(server: StandIn, unbroken: Unbroken, tiny_qwen2: Path, tmp_path: Path) -> None:
    """The last step is saved; resumed with a server that is well, the run ends as the unbroken one."""
    recipe = served_recipe(tmp_path, tiny_qwen2, server, patience_minutes=0.02)
    code, errors = train_with_fault(recipe, server, "error_500", "train.checkpoint_every=100")
    assert code == 3, errors
    assert "is saved: continue with --resume" in errors
    assert server.url in errors
    server.faults.clear()
    result = train(recipe, "--resume")
    assert result.returncode == 0, result.stdout + result.stderr
    assert adapter_of(unbroken.folder) == adapter_of(tmp_path)


def test_a_server_that_cannot_do_it_is_refused_before_the_launch(
    server: StandIn, tiny_qwen2: Path, tmp_path: Path
) -> None:
    """With the flag that it lacks; nothing is written."""
    recipe = served_recipe(tmp_path, tiny_qwen2, server)
    server.takes_adapters = False
    try:
        result = train(recipe)
    finally:
        server.takes_adapters = True
    assert result.returncode == 2, result.stdout + result.stderr
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" in result.stderr
    assert not (tmp_path / "run").exists()
    assert list(tmp_path.glob(".run.server-check*")) == []
    nobody = train(recipe, "generator.url=http://127.0.0.1:9")
    assert nobody.returncode == 2
    assert "start it with" in nobody.stderr
    assert not (tmp_path / "run").exists()
