"""The folder of an evaluation: what `uft eval` and `uft judge` write, and what `uft compare` reads.

    results.json         what was evaluated and how, and each task's numbers
    items/TASK.jsonl     one line an item of a task: its id and its values, so that models can be compared in pairs

`results.json` is written last and whole: a folder without it is an evaluation that has not ended.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from uft_ds.errors import UserError
from uft_ds.host.files import read_regular_text, write_atomically

FORMAT, VERSION = "uft_ds evaluation", 1
RESULTS = "results.json"
ITEMS = "items"


@dataclass(frozen=True)
class TaskResult:
    """The numbers of one task.

    metrics: in the task's own scale (shares in [0, 1], grades of 1 to 10, characters), by name, with a filter behind a
        comma as lm-evaluation-harness writes it (`exact_match,strict-match`).
    version: of the task, as its maker counts. shots: examples in the prompt; None where the task has none to choose.
    judge: the model that graded; None where no model did.
    parts: of a group, the tasks of the same evaluation that it is the mean of.
    """

    task: str
    metrics: Mapping[str, float]
    items: int
    version: str
    shots: int | None = None
    judge: str | None = None
    parts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Evaluation:
    """One model's results.

    name: how tables call it. model: what was evaluated, with hashes. settings: all else that the numbers depend on.
    """

    name: str
    model: Mapping[str, Any]
    settings: Mapping[str, Any]
    tasks: Sequence[TaskResult]


@dataclass(frozen=True)
class ItemResult:
    """One item's values by metric, under the names of `TaskResult.metrics`.

    item: the same for the same question whoever answers it, and unlike that of any other item of the task.
    """

    item: str
    values: Mapping[str, float]


def items_path(folder: Path, task: str) -> Path:
    """Of a task's items. A task's name may hold a slash, a file's may not."""
    return folder / ITEMS / f"{task.replace('/', '__')}.jsonl"


def write_evaluation(folder: Path, found: Evaluation, items: Mapping[str, Iterable[ItemResult]]) -> None:
    """Write an evaluation whole: its items first, and the file that says that it has ended last.

    Args:
        items: by task; a task may have none (a mean of other tasks).

    Raises:
        ValueError: a value is not finite.
    """
    _check_finite(found, items := {task: list(of_task) for task, of_task in items.items()})
    (folder / RESULTS).unlink(missing_ok=True)
    (folder / ITEMS).mkdir(parents=True, exist_ok=True)
    for task, of_task in items.items():
        lines = (json.dumps({"item": one.item, **one.values}, ensure_ascii=False) + "\n" for one in of_task)
        write_atomically(items_path(folder, task), lines)
    head = {"format": FORMAT, "version": VERSION}
    write_atomically(folder / RESULTS, json.dumps(head | asdict(found), indent=2, ensure_ascii=False) + "\n")


def read_evaluation(folder: Path) -> Evaluation:
    """What `write_evaluation` wrote.

    Raises:
        UserError: there is no ended evaluation in the folder, or its file is not one of ours.
    """
    path = folder / RESULTS
    if not path.exists():
        raise UserError(f"{folder}: no {RESULTS}: expected the folder of an evaluation that has ended")
    try:
        found = json.loads(read_regular_text(path))
        if (found["format"], found["version"]) != (FORMAT, VERSION):
            raise UserError(
                f"{path}: version {found['version']!r} of {found['format']!r}; expected {VERSION} of {FORMAT!r}"
            )
        tasks = [TaskResult(**task | {"parts": tuple(task.get("parts", ()))}) for task in found["tasks"]]
        if not (isinstance(found["model"], dict) and isinstance(found["settings"], dict)):
            raise ValueError("model and settings are no objects")
        texts = [found["name"], *(text for task in tasks for text in (task.task, task.version, *task.parts))]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("a name is no text")
        if not all(isinstance(v, int | float) and math.isfinite(v) for task in tasks for v in task.metrics.values()):
            raise ValueError("a metric is no finite number")
        return Evaluation(found["name"], found["model"], found["settings"], tasks)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not the results of an evaluation ({error})") from None


def read_items(folder: Path, task: str) -> list[ItemResult]:
    """The items of a task, in the order in which they were asked.

    Raises:
        UserError: the file is missing, or a line is no item, or an item stands there twice.
    """
    path = items_path(folder, task)
    try:
        lines = read_regular_text(path).split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    found: dict[str, ItemResult] = {}
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            values = json.loads(line)
            item = values.pop("item")
            if not isinstance(item, str) or item in found:
                raise ValueError(f"item {item!r} is no text, or stands here twice")
            if not all(isinstance(value, int | float) and math.isfinite(value) for value in values.values()):
                raise ValueError("a value is no finite number")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}, line {number}: not an item of an evaluation ({error})") from None
        found[item] = ItemResult(item, values)
    return list(found.values())


def _check_finite(found: Evaluation, items: Mapping[str, Sequence[ItemResult]]) -> None:
    for task in found.tasks:
        for metric, value in task.metrics.items():
            if not math.isfinite(value):
                raise ValueError(f"{task.task}: {metric} is {value}")
    for name, of_task in items.items():
        for one in of_task:
            if not all(math.isfinite(value) for value in one.values.values()):
                raise ValueError(f"{name}: item {one.item}: {one.values}")
