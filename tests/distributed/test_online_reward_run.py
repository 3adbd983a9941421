"""An online run whose answers a reward model on the policy's base scores, from training that model to a resumed run."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from reward_models import Conversation, online_recipe, rewards_by
from runs import adapter, assert_same_run, killed_at, uft
from safetensors.torch import load_file
from test_reward_model_run import recipe_of_reward_model
from tiny import build_tiny_model
from transformers import AutoModelForSequenceClassification

from uft_ds.rollouts.record import RecordFolder, StepRecord

pytestmark = pytest.mark.long
"""Without whole runs: rewards on ranks in `test_reward_stream.py`, and what cannot score in
`tests/run/test_reward_of_online_runs.py`."""


@pytest.fixture(scope="module")
def reward(tiny_qwen2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that has trained a reward model, of another rank than the policy's adapter."""
    folder = tmp_path_factory.mktemp("reward")
    result = uft("train", str(recipe_of_reward_model(folder, tiny_qwen2, lora={"rank": 6, "alpha": 9.0})))
    assert result.returncode == 0, result.stdout + result.stderr
    return folder / "run"


@pytest.fixture(scope="module")
def unbroken(tiny_qwen2: Path, reward: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("online")
    result = uft("train", str(online_recipe(folder, tiny_qwen2, reward)))
    assert result.returncode == 0, result.stdout + result.stderr
    return folder / "run"


def records_of(run: Path) -> list[StepRecord]:
    folder = RecordFolder(run / "rollouts")
    found = [folder.read(number) for number in folder.numbers()]
    return [record for record in found if record is not None]


def answers_of(records: list[StepRecord]) -> list[tuple[Conversation, float, float]]:
    """(tokens, raw value, score) of each answer."""
    return [
        ((group.prompt_ids, answer.ids), float(answer.raw or 0.0), float(answer.score or 0.0))
        for record in records
        for group in record.groups
        for answer in group.answers
    ]


def test_the_record_holds_the_rewards_of_the_converted_model(unbroken: Path, reward: Path, tmp_path: Path) -> None:
    """`uft convert --to reward-model`, loaded by nothing but transformers, gives each answer's raw value to 1e-5; the
    score is its sigmoid. Cut answers are among them."""
    result = uft("convert", str(reward), str(tmp_path / "model"), "--to", "reward-model")
    assert result.returncode == 0, result.stdout + result.stderr
    records = records_of(unbroken)
    assert len(records) == 6
    found = answers_of(records)
    assert len(found) == 6 * 8
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    expected_R = rewards_by(model, [tokens for tokens, *_ in found])
    assert expected_R.std() > 0.01, "the rewards should differ"
    torch.testing.assert_close(torch.tensor([raw for _, raw, _ in found]), expected_R, rtol=0, atol=1e-5)
    assert all(score == pytest.approx(1 / (1 + math.exp(-raw)), rel=1e-12) for _, raw, score in found)
    (scorer,) = {json.dumps(record.scorers, sort_keys=True) for record in records}
    named = json.loads(scorer)["0"]
    assert named["map"] == "sigmoid"
    assert named["scorer"]["scorer"].startswith("reward:run/step-")


def test_its_checkpoints_hold_the_policy_alone(unbroken: Path) -> None:
    """No tensor of the reward model, and the configuration of a policy's adapter, which serves and converts as any."""
    for file in (unbroken / "checkpoints").rglob("*.safetensors"):
        assert not [name for name in load_file(file) if "reward" in name or "score" in name]
    config = json.loads((unbroken / "latest" / "adapter" / "adapter_config.json").read_text())
    assert (config["task_type"], config["r"], config["modules_to_save"]) == ("CAUSAL_LM", 4, None)
    assert adapter(unbroken)


def test_invariant_11_a_killed_run_goes_on_bit_for_bit(
    unbroken: Path, tiny_qwen2: Path, reward: Path, tmp_path: Path
) -> None:
    """Metrics, adapter and record, though the reward model has been forwarded between the steps."""
    recipe = online_recipe(tmp_path, tiny_qwen2, reward)
    killed_at(recipe, 5)
    result = uft("train", str(recipe), "--resume")
    assert result.returncode == 0, result.stdout + result.stderr
    without_times(tmp_path / "run")
    assert answers_of(records_of(tmp_path / "run")) == answers_of(records_of(unbroken))
    same = tmp_path / "same"
    shutil.copytree(unbroken, same, symlinks=True)
    without_times(same)
    assert_same_run(tmp_path / "run", same)


OF_TIME = ("rollouts/seconds", "rollouts/generation_seconds", "rollouts/scoring_seconds", "rollouts/replayed")


def without_times(run: Path) -> None:
    """Take what depends on the clock, or on whether a step was read from the record, out of a run's metrics."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [{key: value for key, value in line.items() if key not in OF_TIME} for line in lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))


def test_a_reward_model_that_has_changed_stops_a_resume(tiny_qwen2: Path, reward: Path, tmp_path: Path) -> None:
    """Its content is part of the run's identity."""
    moved = tmp_path / "reward"
    shutil.copytree(reward, moved, symlinks=True)
    recipe = online_recipe(tmp_path / "online", tiny_qwen2, moved, train__steps=2)
    assert uft("train", str(recipe)).returncode == 0
    checkpoint = next(moved.glob("latest/")).resolve()
    shutil.copyfile(
        reward / "checkpoints" / "step-000002" / "adapter" / "adapter_model.safetensors",
        checkpoint / "adapter" / "adapter_model.safetensors",
    )
    (tmp_path / "online" / "run" / "DONE").unlink()
    given = f"data.sources.0.score_by.by=reward:{checkpoint / 'adapter'}"
    result = uft("train", str(recipe), "--resume", given)
    assert result.returncode == 2
    assert "something it depends on has changed since it began" in result.stderr
    assert "reward: " in result.stderr


@pytest.mark.parametrize("kind", ["base", "policy"])
def test_what_cannot_score_is_refused_before_the_launch(
    tiny_qwen2: Path, reward: Path, unbroken: Path, tmp_path: Path, kind: str
) -> None:
    """A policy on another base than the reward model's, and a run that has no head; nothing is written."""
    base = build_tiny_model(tmp_path / "base", "qwen2", seed=3) if kind == "base" else tiny_qwen2
    recipe: Any = online_recipe(tmp_path / "online", base, reward if kind == "base" else unbroken)
    result = uft("train", str(recipe))
    assert result.returncode == 2
    assert "data.sources.0.score_by: " in result.stderr
    expected = "a base of other content" if kind == "base" else "the head of a reward model; expected a run"
    assert expected in result.stderr
    assert not (tmp_path / "online" / "run").exists()
