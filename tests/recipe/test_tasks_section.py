"""`evaluate.tasks` of a recipe: what is refused by the recipe alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from recipes import MINIMAL, refusal

from uft_ds.recipe.to_settings import load_settings

TASK = "{name: sums, path: sums.jsonl, score_by: 'regex:a'}"


def recipe_of(folder: Path, *tasks: str, more: str = "") -> str:
    path = folder / "recipe.yaml"
    path.write_text(f"{MINIMAL}evaluate: {{tasks: [{', '.join(tasks)}]}}\n{more}")
    return str(path)


def test_a_task_has_defaults(tmp_path: Path) -> None:
    """All prompts, 256 tokens an answer; and its score may choose the best checkpoint without held-out data."""
    (task,) = load_settings(recipe_of(tmp_path, TASK, more="train: {keep_best: tasks/sums/score}\n")).tasks
    assert (task.name, task.examples, task.max_new_tokens, task.scorer.by) == ("sums", None, 256, "regex:a")


@pytest.mark.parametrize(
    ("tasks", "more", "words"),
    [
        ([TASK, TASK], "", "evaluate.tasks.0.name: 'sums' is the name of 2 tasks; give each its own"),
        ([TASK.replace("sums.jsonl", "a.jsonl")], "", "'a.jsonl' is a training source"),
        ([TASK.replace("'regex:a'", "length")], "", "evaluate.tasks.0.score_by.map: not given; a length has no scale"),
        ([TASK.replace("'regex:a'", "judge")], "", "evaluate.tasks.0.score_by.judge: not given"),
        (["{name: sums, path: sums.jsonl}"], "", "evaluate.tasks.0.score_by"),
        ([TASK.replace("sums,", "'a/b',")], "", "evaluate.tasks.0.name"),
        (
            [TASK],
            "objective: {reward: head, loss: bce}\n",
            "evaluate.tasks: given, but a reward model answers no prompts",
        ),
        ([TASK], "train: {keep_best: tasks/sum/score}\n", "which cannot choose; take tasks/sums/score"),
        ([], "train: {keep_best: tasks/sums/score}\n", "which cannot choose; evaluate.tasks is empty"),
        ([TASK], "train: {keep_best: tasks/sums/score, checkpoint_every: 3, evaluate_every: 2}\n", "multiples"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, tasks: list[str], more: str, words: str) -> None:
    """By its key, before anything is read."""
    assert words in refusal(recipe_of(tmp_path, *tasks, more=more))


@pytest.mark.parametrize(
    ("trained", "task"),
    [
        ("path: a.jsonl", "path: ./a.jsonl"),
        ("path: ./data/../a.jsonl", "path: a.jsonl"),
        ("path: a.jsonl", "path: link.jsonl"),
        ("path: owner/set", "path: owner/set, split: train"),
        ("path: owner/set, split: train", "path: owner/set"),
    ],
)
def test_a_training_source_is_known_however_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: str, task: str
) -> None:
    """A path in another spelling, and a split that is the default."""
    monkeypatch.chdir(tmp_path)
    Path("link.jsonl").symlink_to(tmp_path / "a.jsonl")
    path = Path(recipe_of(tmp_path, f"{{name: sums, {task}, score_by: 'regex:a'}}"))
    path.write_text(path.read_text().replace("path: a.jsonl", trained, 1))
    assert "is a training source; a task's prompts must not be trained on" in refusal(str(path))
    path.write_text(path.read_text().replace(f"sums, {task}", "sums, path: owner/set, split: test"))
    assert load_settings(str(path)).tasks[0].split == "test"
