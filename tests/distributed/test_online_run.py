"""Online runs by the command: killed and resumed, replayed, and their record as data for another run."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from runs import TIMEOUT_SECONDS, program, uft, wait_for_the_end_of, write_recipe, write_rows

from uft_ds.record.metrics_file import read_metrics

STEPS = 5
SCORER = """\
import os
import pathlib
import signal

TRAP = pathlib.Path(__file__).with_name("trap")


def score(messages, response, meta):
    if TRAP.exists():
        TRAP.unlink()
        os.kill(os.getppid(), signal.SIGKILL)
    return (sum(map(ord, response)) + meta["number"]) % 11 / 10
"""


def online_recipe(folder: Path, base: Path, **changes: Any) -> Path:
    """Half of each step are answers to three prompts, half are rows with right answers; a scorer of the user's."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "made_up_scorer.py").write_text(SCORER)
    recipe = write_recipe(folder, base, train__steps=STEPS, train__keep_checkpoints=5, **changes)
    tree = yaml.safe_load(recipe.read_text())
    prompts = write_rows(folder / "prompts.jsonl", [{"prompt": f"Say {i}", "number": i} for i in range(9)])
    tree["data"]["sources"][1] = {
        "format": "prompts",
        "path": str(prompts),
        "answers": 3,
        "score_by": {"by": "code:made_up_scorer:score", "workers": 1},
        "share": 0.5,
    }
    tree["generator"] = {"max_new_tokens": 8}
    recipe.write_text(yaml.safe_dump(tree))
    return recipe


def train(recipe: Path, *options: str) -> Any:
    return uft("train", str(recipe), *options, PYTHONPATH=str(recipe.parent))


def adapter_of(run: Path) -> bytes:
    return (run / "checkpoints" / f"step-{STEPS:06d}" / "adapter" / "adapter_model.safetensors").read_bytes()


def answers_of(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((run / "rollouts" / "answers").glob("*.jsonl"))}


def groups_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for content in answers_of(run).values() for line in content.decode().split("\n") if line]


@pytest.fixture(scope="module")
def unbroken(tiny_qwen2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an online run that has ended."""
    folder = tmp_path_factory.mktemp("online")
    result = train(online_recipe(folder, tiny_qwen2))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "score of answers" in result.stdout
    return folder / "run"


def test_an_online_run_trains_on_what_it_records(unbroken: Path) -> None:
    """Groups of three answers with scores of the user's function, beside fixed data, in every step."""
    lines = [line for line in read_metrics(unbroken / "metrics.jsonl") if "grad_norm" in line]
    assert len(lines) == STEPS
    groups = groups_of(unbroken)
    assert sum(line["responses/score"] for line in lines) == 3 * len(groups)
    assert all(line["responses/instruction"] > 0 for line in lines)
    scores = [answer["score"] for group in groups for answer in group["answers"]]
    mean = sum(line["rollouts/score"] * line["responses/score"] for line in lines) / len(scores)
    assert mean == pytest.approx(sum(scores) / len(scores))
    assert len(set(scores)) > 3
    assert lines[0]["log_ratio/score"] == 0.0
    for group in groups:
        for answer in group["answers"]:
            number = int(group["messages"][0]["content"].split()[1])
            assert answer["score"] == (sum(map(ord, answer["text"])) + number) % 11 / 10
            assert 1 <= len(answer["ids"]) <= 8
    assert (unbroken / "report.html").exists()


@pytest.mark.long
def test_rloo_trains_on_own_answers_beside_data(tiny_qwen2: Path, tmp_path: Path) -> None:
    """Each prompt's scores less the mean of its other answers, from the record, are the advantages of the first step,
    where every log-ratio is 0. The instruction keeps its own loss; scored answers of data are held out without one."""
    recipe = online_recipe(tmp_path, tiny_qwen2)
    tree = yaml.safe_load(recipe.read_text())
    tree["objective"] = {"loss": {"instruction": "mse", "score": "rloo"}, "beta": {"instruction": 0.01, "score": 0.05}}
    tree["train"]["steps"] = 2
    recipe.write_text(yaml.safe_dump(tree))
    result = train(recipe)
    assert result.returncode == 0, result.stdout + result.stderr
    found = read_metrics(tmp_path / "run" / "metrics.jsonl")
    lines = [line for line in found if "grad_norm" in line]
    record = (tmp_path / "run" / "rollouts" / "answers" / "000001.jsonl").read_text()
    scores = [[answer["score"] for answer in json.loads(line)["answers"]] for line in record.splitlines()]
    advantages = [s - (sum(group) - s) / (len(group) - 1) for group in scores for s in group]
    assert lines[0]["advantage/score"] == pytest.approx(sum(map(abs, advantages)) / len(advantages), rel=1e-6)
    assert lines[0]["advantage/score"] > 0.0
    assert lines[0]["flat_groups"] == sum(len(set(group)) == 1 for group in scores) / len(scores)
    assert all(line["grad_norm"] > 0.0 and line["loss/instruction"] > 0.0 for line in lines)
    assert lines[1]["log_ratio/score"] != 0.0
    evaluated = [line for line in found if "held_out/log_ratio/score" in line]
    assert len(evaluated) == 2
    assert not any("held_out/loss" in line for line in evaluated)
    assert (tmp_path / "run" / "report.html").exists()


def killed(recipe: Path, is_time: Any) -> None:
    """Train until it is time, then SIGKILL the command and its ranks."""
    process = program("uft_ds", "train", str(recipe), PYTHONPATH=str(recipe.parent))
    deadline = time.monotonic() + TIMEOUT_SECONDS
    try:
        while not is_time(process):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.kill_group()
    wait_for_the_end_of(recipe.parent / "run")


def is_recorded(run: Path) -> Any:
    """Whether a record has appeared that no step has trained on yet."""

    def look(process: Any) -> bool:
        assert process.poll() is None, "it ended by itself"
        return (run / "rollouts" / "steps" / "000004.json").exists()

    return look


def assert_is_the_unbroken_one(run: Path, unbroken: Path) -> None:
    assert adapter_of(run) == adapter_of(unbroken)
    assert [normal(group) for group in groups_of(run)] == [normal(group) for group in groups_of(unbroken)]
    assert list((run / "rollouts" / "answers").glob("*.aside")) == []
    replayed = [line["rollouts/replayed"] for line in read_metrics(run / "metrics.jsonl") if "grad_norm" in line]
    assert 1.0 in replayed


def test_invariant_11_a_killed_online_run_is_the_unbroken_one(unbroken: Path, tiny_qwen2: Path, tmp_path: Path) -> None:
    """Killed when a record appears that no step has trained on yet."""
    recipe = online_recipe(tmp_path, tiny_qwen2)
    killed(recipe, is_recorded(tmp_path / "run"))
    result = train(recipe, "--resume")
    assert result.returncode == 0, result.stdout + result.stderr
    assert_is_the_unbroken_one(tmp_path / "run", unbroken)


@pytest.mark.long
def test_invariant_11_a_run_that_is_killed_again_while_it_scores_is_the_unbroken_one(
    unbroken: Path, tiny_qwen2: Path, tmp_path: Path
) -> None:
    """By the scorer, in the resume of a run that was killed before.

    A resume with another scorer is refused, because the run would learn two things; what was trained is kept.
    """
    recipe = online_recipe(tmp_path, tiny_qwen2)
    killed(recipe, is_recorded(tmp_path / "run"))

    (tmp_path / "trap").touch()
    shot = train(recipe, "--resume")
    assert shot.returncode not in (0, 2, 3), shot.stdout
    assert not (tmp_path / "trap").exists()

    scorer = tmp_path / "made_up_scorer.py"
    scorer.write_text(SCORER + "# another version\n")
    refused = train(recipe, "--resume")
    assert refused.returncode == 2, refused.stdout
    assert "the scorer is another one than in the steps before" in refused.stdout + refused.stderr
    scorer.write_text(SCORER)
    result = train(recipe, "--resume")
    assert result.returncode == 0, result.stdout + result.stderr
    assert_is_the_unbroken_one(tmp_path / "run", unbroken)


def normal(group: dict[str, Any]) -> dict[str, Any]:
    """Without the folder that the data lies in."""
    return group | {"origin": Path(group["origin"]).name}


def test_invariant_11_a_replay_trains_the_same_adapter(unbroken: Path, tmp_path: Path) -> None:
    """From the record alone: no answer is generated, and the scorer is not there any more."""
    recipe = unbroken.parent / "recipe.yaml"
    result = uft("train", str(recipe), "--replay", str(unbroken), f"output={tmp_path / 'replay'}")
    assert result.returncode == 0, result.stdout + result.stderr
    assert adapter_of(tmp_path / "replay") == adapter_of(unbroken)
    assert answers_of(tmp_path / "replay") == answers_of(unbroken)
    more = uft("train", str(recipe), "--replay", str(unbroken), f"output={tmp_path / 'more'}", "train.steps=9")
    assert more.returncode == 2
    assert f"step {STEPS + 1} is not recorded, the run has 9 steps; set train.steps={STEPS}" in more.stderr


@pytest.mark.long
def test_a_record_is_a_scored_data_set(unbroken: Path, tiny_qwen2: Path, tmp_path: Path) -> None:
    """Of the exact tokens: a run on another tokenizer refuses it, by file and line."""
    recipe = write_recipe(tmp_path, tiny_qwen2, train__steps=2)
    tree = yaml.safe_load(recipe.read_text())
    path = unbroken / "rollouts" / "answers"
    tree["data"]["sources"] = [{"format": "recorded", "path": str(path), "allow_one_score": True}]
    recipe.write_text(yaml.safe_dump(tree))
    result = uft("train", str(recipe))
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads((tmp_path / "run" / "data" / "report.json").read_text())
    assert report["train"][0]["responses"] == 3 * len(groups_of(unbroken))
    (first,) = groups_of(unbroken)[:1]
    preview = uft("data", "preview", str(recipe), "--rows", "1")
    assert preview.returncode == 0, preview.stderr
    changed = tmp_path / "changed.jsonl"
    changed.write_text(json.dumps(first | {"tokenizer": "0" * 64}) + "\n")
    refused = uft("train", str(recipe), f"data.sources.0.path={changed}", f"output={tmp_path / 'other'}")
    assert refused.returncode == 2
    assert "changed.jsonl:1" in refused.stderr
    assert "its tokens are of the tokenizer 000000000000" in refused.stderr


def test_what_would_fail_later_is_refused_before_the_launch(tiny_qwen2: Path, tmp_path: Path) -> None:
    """A scorer that is not there, prompts that leave no room, keys that go with nothing: exit 2, nothing written."""
    recipe = online_recipe(tmp_path, tiny_qwen2)
    for override, message in {
        "data.sources.1.score_by.by=code:made_up_scorer:no_such": "data.sources.1.score_by: ",
        "data.sources.1.score_by.by=length": "data.sources.1.score_by.map: not given",
        "generator.max_new_tokens=64": "generator.max_new_tokens: 64 leaves no room for a prompt",
        "generator.by=vllm": "generator.url: not given; by: vllm needs it",
        "generator.run=runs/other": "generator.run: given, but by is 'builtin'",
        "data.sources.1.answers=null": "data.sources.1.answers: not given",
    }.items():
        result = train(recipe, override)
        assert result.returncode == 2, (override, result.stdout, result.stderr)
        assert message in result.stderr, (override, result.stderr)
    assert not (tmp_path / "run").exists()
