"""`evaluate.tasks` of a recipe: what is refused by the recipe alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from recipes import MINIMAL, refusal

from uft_ds.recipe.settings import load_settings

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
