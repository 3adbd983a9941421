"""Tasks of whole runs by the command: they change nothing of the training, choose checkpoints, and can be resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from runs import assert_same_shards, numbers, uft, write_recipe, write_rows
from test_online_run import killed
from transformers import AutoModelForCausalLM, AutoTokenizer

from uft_ds.record.metrics_file import read_metrics

SCORER = """\
def score(messages, response, meta):
    return None if meta["number"] == 3 else (sum(map(ord, response)) + meta["number"]) % 11 / 10
"""
FAILING = """\
import pathlib

COUNT = pathlib.Path(__file__).with_name("count")


def score(messages, response, meta):
    seen = int(COUNT.read_text()) if COUNT.exists() else 0
    COUNT.write_text(str(seen + 1))
    if seen >= 10:
        raise RuntimeError("no more")
    return 0.5
"""


def recipe_with_tasks(folder: Path, base: Path, **changes: Any) -> Path:
    """Two tasks, of which one takes the first three of its ten prompts."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "grading_of_tasks.py").write_text(SCORER)
    prompts = write_rows(folder / "prompts.jsonl", [{"prompt": f"Ask {i}", "number": i} for i in range(10)])
    scorer = {"by": "code:grading_of_tasks:score", "workers": 1}
    tasks = [
        {"name": "sums", "path": str(prompts), "score_by": scorer, "max_new_tokens": 8},
        {"name": "first", "path": str(prompts), "score_by": "regex:e", "examples": 3, "max_new_tokens": 4},
    ]
    return write_recipe(
        folder, base, **{"evaluate": {"tasks": tasks}, "train__keep_best": "tasks/sums/score"} | changes
    )


def train(recipe: Path, *options: str) -> Any:
    return uft("train", str(recipe), *options, PYTHONPATH=str(recipe.parent))


def adapter_of(run: Path) -> bytes:
    return (run / "latest" / "adapter" / "adapter_model.safetensors").read_bytes()


def answers_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "tasks.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run(tiny_qwen2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with tasks that has ended."""
    folder = tmp_path_factory.mktemp("tasks")
    result = train(recipe_with_tasks(folder, tiny_qwen2))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "tasks, step 4:" in result.stdout
    assert (
        f"1 of 13 answers have no score and count for nothing; the first: {folder}/prompts.jsonl:4 of sums"
        in result.stdout
    )
    return folder / "run"


@pytest.mark.long
def test_the_metrics_are_those_of_the_recorded_answers(run: Path) -> None:
    """At steps 0, 2 and 4: means over the answers that have a score, graded as the user's function says."""
    lines = {line["step"]: line for line in read_metrics(run / "metrics.jsonl") if "tasks/sums/score" in line}
    assert list(lines) == [0, 2, 4]
    for step, line in lines.items():
        of = {
            name: [a for a in answers_of(run) if (a["step"], a["task"]) == (step, name)] for name in ("sums", "first")
        }
        assert [len(answers) for answers in of.values()] == [10, 3]
        graded = [(sum(map(ord, a["answer"])) + n) % 11 / 10 for n, a in enumerate(of["sums"]) if n != 3]
        assert line["tasks/sums/score"] == pytest.approx(sum(graded) / 9)
        assert (line["tasks/sums/unscored"], line["tasks/first/unscored"]) == (1.0, 0.0)
        assert line["tasks/first/score"] == pytest.approx(sum("e" in a["answer"] for a in of["first"]) / 3)
        assert line["tasks/sums/truncated"] == sum(not a["ended"] for a in of["sums"]) / 10
        assert line["tasks/first/answer_tokens"] <= 4
    assert "Answers to tasks" in (run / "report.html").read_text()


@pytest.mark.long
def test_tasks_change_no_bit_and_choose_the_checkpoint(run: Path, tiny_qwen2: Path, tmp_path: Path) -> None:
    """The adapter is that of a run without tasks; beside the newest checkpoint the one with the best score is kept."""
    without = recipe_with_tasks(tmp_path, tiny_qwen2, evaluate={"tasks": []}, train__keep_best=None)
    result = train(without)
    assert result.returncode == 0, result.stdout + result.stderr
    assert adapter_of(run) == adapter_of(tmp_path / "run")
    scores = {
        line["step"]: line["tasks/sums/score"]
        for line in read_metrics(run / "metrics.jsonl")
        if "tasks/sums/score" in line
    }
    best = max(scores.values())
    kept = {int(path.name.removeprefix("step-")) for path in (run / "checkpoints").iterdir()}
    assert kept == {4, next(step for step in (2, 4, 0) if scores[step] == best)}


@pytest.mark.long
def test_a_resumed_run_may_have_other_tasks(tiny_qwen2: Path, tmp_path: Path) -> None:
    """A run without tasks that is continued with one answers from where it goes on; a task that has the name of another
    one is refused, also one of other prompts, but not the same prompts in another place."""
    recipe = recipe_with_tasks(tmp_path, tiny_qwen2, train__steps=2, train__schedule="constant")
    tree = yaml.safe_load(recipe.read_text())
    recipe.write_text(yaml.safe_dump(tree | {"evaluate": {"tasks": []}, "train": tree["train"] | {"keep_best": None}}))
    assert train(recipe).returncode == 0
    tree["train"]["steps"] = 4
    tree["evaluate"]["tasks"] = tree["evaluate"]["tasks"][1:]
    tree["train"]["keep_best"] = "tasks/first/score"
    recipe.write_text(yaml.safe_dump(tree))
    result = train(recipe, "--resume")
    assert result.returncode == 0, result.stdout + result.stderr
    assert {(a["step"], a["task"]) for a in answers_of(tmp_path / "run")} == {(2, "first"), (4, "first")}
    tree["train"]["steps"] = 6
    tree["evaluate"]["tasks"][0]["examples"] = 2
    recipe.write_text(yaml.safe_dump(tree))
    result = train(recipe, "--resume")
    assert result.returncode == 2
    assert "evaluate.tasks: 'first' is another task than when the run began; give it another name" in result.stderr
    other = write_rows(tmp_path / "other.jsonl", [{"prompt": f"Ask another {i}"} for i in range(10)])
    tree["evaluate"]["tasks"][0] |= {"examples": 3, "path": str(other)}
    recipe.write_text(yaml.safe_dump(tree))
    result = train(recipe, "--resume")
    assert result.returncode == 2
    assert "'first' is another task than when the run began (rows); give it another name" in result.stderr
    other.write_bytes((tmp_path / "prompts.jsonl").read_bytes())
    result = train(recipe, "--resume", "--dry-run")
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.long
def test_a_scorer_that_fails_costs_no_step(tiny_qwen2: Path, tmp_path: Path) -> None:
    """The user's function raises from the second evaluation on: warnings, no score there, and a run that is done."""
    recipe = recipe_with_tasks(tmp_path, tiny_qwen2)
    (tmp_path / "grading_of_tasks.py").write_text(FAILING)
    result = train(recipe)
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "run" / "DONE").exists()
    lines = {
        line["step"]: line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "tasks/sums/unscored" in line
    }
    assert ["tasks/sums/score" in lines[step] for step in (0, 2, 4)] == [True, False, False]
    assert [lines[step]["tasks/sums/unscored"] for step in (0, 2, 4)] == [0.0, 10.0, 10.0]
    assert "10 of 13 answers have no score and count for nothing" in result.stdout


def answered_by_hugging_face(model: Any, tokenizer: Any, prompt: str) -> str:
    asked = [{"role": "user", "content": prompt}]
    row = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**row, max_new_tokens=8, do_sample=False)[0, row["input_ids"].shape[1] :]
    return str(tokenizer.decode(answer, skip_special_tokens=True)).strip()


@pytest.mark.long
def test_a_killed_run_of_all_parameters_answers_and_keeps_the_best_as_the_unbroken_one(
    tiny_qwen2: Path, tmp_path: Path
) -> None:
    """On ranks that share rows: the same checkpoints, answers, metrics and bits; the last answers are those of Hugging
    Face's `generate` by the converted model."""
    changes: dict[str, Any] = {
        "lora": None, "launch": {"ranks": 2, "sequence_parallel": 2}, "train__lr": 1e-3, "train__steps": 6,
    }  # fmt: skip
    unbroken, broken = tmp_path / "unbroken" / "run", tmp_path / "broken" / "run"
    result = train(recipe_with_tasks(unbroken.parent, tiny_qwen2, **changes))
    assert result.returncode == 0, result.stdout + result.stderr
    recipe = recipe_with_tasks(broken.parent, tiny_qwen2, **changes)

    def after_step_5(process: Any) -> bool:
        assert process.poll() is None, "it ended by itself"
        metrics = broken / "metrics.jsonl"
        return metrics.exists() and any(line["step"] == 5 for line in read_metrics(metrics))

    killed(recipe, after_step_5)
    result = train(recipe, "--resume")
    assert result.returncode == 0, result.stdout + result.stderr
    assert numbers(broken) == numbers(unbroken)
    assert_same_shards(broken, unbroken)
    answers = answers_of(broken)
    assert [a | {"origin": ""} for a in answers] == [a | {"origin": ""} for a in answers_of(unbroken)]
    kept = [sorted(path.name for path in (run / "checkpoints").iterdir()) for run in (broken, unbroken)]
    assert kept[0] == kept[1]
    assert len(kept[0]) == 2, "the best one should not be the newest one"
    result = uft("convert", str(broken), str(tmp_path / "model"))
    assert result.returncode == 0, result.stderr
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    last = [a for a in answers if (a["step"], a["task"]) == (6, "sums")]
    assert [answered_by_hugging_face(model, tokenizer, a["prompt"]) for a in last] == [a["answer"] for a in last]
