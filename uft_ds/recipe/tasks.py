"""The section `evaluate` of a recipe: tasks whose prompts the policy answers at each evaluation, graded by a scorer."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import Annotated

from pydantic import BeforeValidator, Field

from uft_ds.recipe.online import Problem, ScoreBySection, scored_by, scorer_problems
from uft_ds.recipe.section import Location, Positive, Section


class TaskSection(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    """The task's name in metrics: tasks/NAME/score."""
    path: Location
    """A file or folder with prompts, as for a source of `format: prompts`: one never trained on."""
    split: str | None = None
    """As in a source."""
    columns: dict[str, str | None] = {}
    """As in a source: {prompt: question}."""
    examples: Positive | None = None
    """The first so many prompts of the data; null: all."""
    score_by: Annotated[ScoreBySection, BeforeValidator(scored_by)]
    """What grades the answers, as in an online source. A text alone is its `by`."""
    max_new_tokens: Positive = 256
    """Largest number of tokens of an answer."""


class EvaluateSection(Section):
    tasks: list[TaskSection] = []
    """Prompts that the policy answers greedily before the first step and at each evaluation (train.evaluate_every).
    They change nothing of the training; train.keep_best may choose by tasks/NAME/score."""


def task_problems(
    tasks: Sequence[TaskSection], trained_on: Collection[tuple[str, str | None]], *, reward: str
) -> Iterator[Problem]:
    """(key, problem) for every fault of the tasks that the recipe alone shows.

    Args:
        trained_on: path and split of each training source.
        reward: the recipe's `objective.reward`.
    """
    if tasks and reward == "head":
        yield "evaluate.tasks", "given, but a reward model answers no prompts; leave it out"
    times = Counter(task.name for task in tasks)
    trained = {_place(path, split) for path, split in trained_on}
    for number, task in enumerate(tasks):
        key = f"evaluate.tasks.{number}"
        if times[task.name] > 1:
            yield f"{key}.name", f"{task.name!r} is the name of {times[task.name]} tasks; give each its own"
        if _place(task.path, task.split) in trained:
            yield f"{key}.path", f"{task.path!r} is a training source; a task's prompts must not be trained on"
        yield from ((f"{key}.{name}", problem) for name, problem in scorer_problems(task.score_by))


def _place(path: str, split: str | None) -> tuple[str, str]:
    """Where rows are, whichever way it is written: `./a.jsonl` is `a.jsonl`, and no split of a hub's set is `train`."""
    return os.path.realpath(path), split or "train"
