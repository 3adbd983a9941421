"""The models of a comparison: which folders belong to each, and whether their numbers may stand beside each other."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from uft_ds.errors import UserError
from uft_ds.evaluation.columns import Column, plain_metric
from uft_ds.evaluation.results import (
    RESULTS,
    Evaluation,
    TaskResult,
    items_path,
    read_evaluation,
    read_items,
)

_EQUAL = 1e-6
"""A mean of items that differs more from the reported number is not what that number is the mean of."""


@dataclass(frozen=True)
class Contestant:
    """A model and its evaluations, with the folder of each."""

    name: str
    evaluations: Sequence[tuple[Path, Evaluation]]
    _read: dict[str, dict[str, Mapping[str, float]]] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def results(self) -> Mapping[str, tuple[Path, Evaluation, TaskResult]]:
        """Each task's result, by name."""
        return {
            result.task: (folder, evaluation, result)
            for folder, evaluation in self.evaluations
            for result in evaluation.tasks
        }

    def value(self, column: Column) -> float | None:
        """The mean of the column's metrics; None where the task or one of them is missing."""
        if column.task not in self.results:
            return None
        metrics = {plain_metric(name): value for name, value in self.results[column.task][2].metrics.items()}
        if any(metric not in metrics for metric in column.metrics):
            return None
        return sum(metrics[metric] for metric in column.metrics) / len(column.metrics)

    def item_values(self, column: Column) -> Mapping[str, float]:
        """The column's value of each item; none where the reported number is not the mean of what items have.

        (An instruction-level accuracy of ifeval is a mean over instructions, not over items.)

        Raises:
            UserError: a file of items is damaged.
        """
        items = self._items(column.task)
        if not items or not all(metric in values for values in items.values() for metric in column.metrics):
            return {}
        found = {
            item: sum(values[metric] for metric in column.metrics) / len(column.metrics)
            for item, values in items.items()
        }
        value = self.value(column)
        if value is None or abs(sum(found.values()) / len(found) - value) > _EQUAL * max(1.0, abs(value)):
            return {}
        return found

    def _items(self, task: str) -> dict[str, Mapping[str, float]]:
        """Of the task, or of the tasks that a group is the mean of; each under a name that no other task has."""
        if task not in self.results:
            return {}
        if task not in self._read:
            parts = [task] if self._has_items(task) else self.results[task][2].parts
            self._read[task] = {
                f"{part}: {one.item}": {plain_metric(name): value for name, value in one.values.items()}
                for part in parts
                if self._has_items(part)
                for one in read_items(self.results[part][0], part)
            }
        return self._read[task]

    def _has_items(self, task: str) -> bool:
        return task in self.results and items_path(self.results[task][0], task).exists()


def pairs_of(ours: Mapping[str, float], theirs: Mapping[str, float]) -> tuple[NDArray[np.float64], ...] | None:
    """Both models' values of the same items, in one order; None if they did not have the same items."""
    if not ours or ours.keys() != theirs.keys():
        return None
    return np.array(list(ours.values())), np.array([theirs[item] for item in ours])


def contestants_of(given: Sequence[str]) -> list[Contestant]:
    """The models that were named on the command line, in that order.

    Args:
        given: `FOLDER` or `NAME=FOLDER`, each the folder of an evaluation, or one with such folders in it or in its
            `evaluations` (a run). Evaluations of one name belong to one model.

    Raises:
        UserError: a folder has no evaluation, fewer than two models, or a task stands twice in one model.
    """
    found: dict[str, list[tuple[Path, Evaluation]]] = {}
    for words in given:
        has_name = "=" in words and not Path(words).exists()
        name, _, folder = words.partition("=") if has_name else ("", "", words)
        if not folder.strip() or (has_name and not name.strip()):
            raise UserError(f"found {words!r}, expected FOLDER or NAME=FOLDER; is a variable of the shell not set?")
        for path in _folders_in(Path(folder)):
            evaluation = read_evaluation(path)
            found.setdefault(name or evaluation.name, []).append((path, evaluation))
    contestants = [Contestant(name, evaluations) for name, evaluations in found.items()]
    for contestant in contestants:
        _check_once(contestant)
    if len(contestants) < 2:
        raise UserError(
            f"expected the evaluations of at least two models, found those of {', '.join(found)}; "
            "give models that have the same name others, as NAME=FOLDER"
        )
    return contestants


def unlike_settings(contestants: Sequence[Contestant], columns: Sequence[Column]) -> list[str]:
    """What makes numbers of one column incomparable: another judge, version, shots, number of items, or setting."""
    found = []
    for task in dict.fromkeys(column.task for column in columns):
        asked = [(one.name, _conditions(*one.results[task][1:])) for one in contestants if task in one.results]
        for name, conditions in asked[1:]:
            first_name, first = asked[0]
            found += [
                f"{task}: {key}: {_shown(first.get(key))} for {first_name}, {_shown(conditions.get(key))} for {name}"
                for key in dict.fromkeys([*first, *conditions])
                if first.get(key) != conditions.get(key)
            ]
    return found


def cut_prompts(contestants: Sequence[Contestant], columns: Sequence[Column]) -> list[str]:
    """Of each task, of how many questions the prompts lost their beginning, as far as any did."""
    found = []
    for task in dict.fromkeys(column.task for column in columns):
        counts = {one.name: _cut(*one.results[task][1:]) for one in contestants if task in one.results}
        if any(counts.values()):
            shown = ", ".join(f"{count:,} for {name}" for name, count in counts.items())
            found.append(f"{task}: questions whose prompts did not fit into the positions and were cut: {shown}")
    return found


def _cut(evaluation: Evaluation, result: TaskResult) -> int:
    counts = evaluation.model.get("cut_prompts")
    if not isinstance(counts, Mapping):
        return 0
    return sum(int(counts.get(task, 0)) for task in {result.task, *result.parts})


_OF_SUITE = ("suite", "tasks", "data", "server")
"""Settings of a whole suite, of which a task is a part: what of them concerns the task is compared in its place."""


def _conditions(evaluation: Evaluation, result: TaskResult) -> dict[str, Any]:
    settings = evaluation.settings
    found = {"version": result.version, "shots": result.shots, "items": result.items, "judge": result.judge}
    found |= {f"settings.{key}": value for key, value in settings.items() if key not in _OF_SUITE}
    if "server" in settings:
        found["settings.server"] = settings["server"] is not None  # not where it is, nor the model's name there
    tasks = settings.get("tasks")
    of_task = [tasks.get(task) for task in result.parts or (result.task,)] if isinstance(tasks, Mapping) else []
    contents = [one["content"] for one in of_task if isinstance(one, Mapping) and "content" in one]
    if contents and len(contents) == len(of_task):
        text = " ".join(contents)
        found["settings.tasks.content"] = text if len(contents) == 1 else hashlib.sha256(text.encode()).hexdigest()
    else:  # of another maker
        found |= {f"settings.{key}": settings[key] for key in ("tasks", "data") if key in settings}
    return found


def _shown(value: Any) -> str:
    return "not given" if value is None else repr(value)


def _folders_in(folder: Path) -> list[Path]:
    if (folder / RESULTS).exists():
        return [folder]
    found = sorted(path.parent for pattern in ("*", "evaluations/*") for path in folder.glob(f"{pattern}/{RESULTS}"))
    if not found:
        raise UserError(
            f"{folder}: no evaluation in it: expected {RESULTS} there, one folder below, or in a run's evaluations "
            "folder; it is written when an evaluation has ended"
        )
    return found


def _check_once(contestant: Contestant) -> None:
    seen: dict[str, Path] = {}
    for folder, evaluation in contestant.evaluations:
        for result in evaluation.tasks:
            if result.task in seen:
                raise UserError(
                    f"{contestant.name}: {result.task} is in {seen[result.task]} and in {folder}; "
                    "name the one that counts, or give models that have the same name others, as NAME=FOLDER"
                )
            seen[result.task] = folder
    known = [(folder, weights) for folder, one in contestant.evaluations if (weights := _weights_of(one))]
    for folder, weights in known[1:]:
        if weights != known[0][1]:
            raise UserError(
                f"{contestant.name}: {known[0][0]} and {folder} are evaluations of two models, by the hashes of their "
                "weights; give them names of their own, as NAME=FOLDER"
            )


def _weights_of(evaluation: Evaluation) -> dict[str, Any]:
    """The hashes of the base's weights and of the adapter, or nothing where they are not known.

    Where answers were judged, the model that gave them is described by the record of `uft generate`.
    """
    model = evaluation.model.get("model", evaluation.model)
    if not isinstance(model, Mapping) or "base_weights" not in model:
        return {}
    return {"base": model["base_weights"], "adapter": model.get("adapter")}
