"""What becomes of the answers: each task's numbers, each question's values, and the questions with their answers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from uft_ds.evaluation.results import ItemResult, TaskResult, items_path
from uft_ds.host.files import write_atomically

SAMPLES = "samples"
_MATH, _MATH_ORIGINAL = "leaderboard_math_hard", "exact_match_original,none"
_LETTERS_OF_PROMPT = 1000
_NUMBERS = (int, float, np.bool_, np.number)


def task_results(results: Mapping[str, Any]) -> list[TaskResult]:
    """The numbers of all tasks and groups.

    Args:
        results: of the harness's `evaluate`.
    """
    groups = results.get("group_subtasks", {})
    found: dict[str, TaskResult] = {}
    for name, values in results["results"].items():
        metrics = _numbers(values)
        if name == _MATH:
            metrics |= _weighted(results, groups[name], _MATH_ORIGINAL)
        if metrics:
            found[name] = TaskResult(
                name,
                metrics,
                _items(results, groups, name),
                str(results["versions"].get(name)),
                _shots(results, groups, name),
                parts=tuple(_leaves(groups, name)) if name in groups else (),
            )
    return list(found.values())


def item_results(results: Mapping[str, Any]) -> dict[str, list[ItemResult]]:
    """Each question's values by task. A value that is no number (IFEval's lists by instruction) is left out."""
    return {
        task: [ItemResult(item, _values_of(of_item)) for item, of_item in _by_item(samples).items()]
        for task, samples in results["samples"].items()
    }


def write_samples(folder: Path, results: Mapping[str, Any]) -> None:
    """Write the end of each question's prompt, what was answered, and what is right, to look at."""
    (folder / SAMPLES).mkdir(parents=True, exist_ok=True)
    for task, samples in results["samples"].items():
        lines = (json.dumps(_shown(item, of_item), ensure_ascii=False) + "\n" for item, of_item in
                 _by_item(samples).items())  # fmt: skip
        write_atomically(folder / SAMPLES / items_path(folder, task).name, lines)


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    found = {}
    for name, value in values.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if "," in name and "_stderr," not in name and is_number:
            found[name] = float(value)
    return found


def _weighted(results: Mapping[str, Any], tasks: Iterable[str], metric: str) -> dict[str, float]:
    """The mean of a metric over tasks by their size, which the harness's group leaves out."""
    pairs = [(results["results"][task][metric], results["n-samples"][task]["effective"]) for task in tasks]
    return {metric: math.fsum(value * count for value, count in pairs) / sum(count for _, count in pairs)}


def _items(results: Mapping[str, Any], groups: Mapping[str, list[str]], name: str) -> int:
    if name not in groups:
        return int(results["n-samples"][name]["effective"])
    return sum(_items(results, groups, child) for child in groups[name])


def _leaves(groups: Mapping[str, list[str]], name: str) -> list[str]:
    """The tasks of a group, those of its groups too."""
    return [leaf for child in groups[name] for leaf in (_leaves(groups, child) if child in groups else [child])]


def _shots(results: Mapping[str, Any], groups: Mapping[str, list[str]], name: str) -> int | None:
    """Of a task, or of all tasks of a group; None where they are not known, or not the same."""
    of_leaves = {results["n-shot"].get(leaf) for leaf in (_leaves(groups, name) if name in groups else [name])}
    (shots,) = of_leaves if len(of_leaves) == 1 else (None,)
    return shots if isinstance(shots, int) else None


def _by_item(samples: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The samples of each question, one for each filter of its answer. The id holds its place and its content."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for sample in samples:
        found.setdefault(f"{sample['doc_id']}-{sample['doc_hash'][:16]}", []).append(sample)
    return found


def _values_of(of_item: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    return {
        f"{metric},{sample['filter']}": float(sample[metric])
        for sample in of_item
        for metric in sample["metrics"]
        if isinstance(sample[metric], _NUMBERS)
    }


def _shown(item: str, of_item: list[Mapping[str, Any]]) -> dict[str, Any]:
    first = of_item[0]
    return {
        "item": item,
        "prompt_end": first["arguments"][0][0][-_LETTERS_OF_PROMPT:],
        "choices": [args[1] for args in first["arguments"]] if _has_choices(first["arguments"]) else None,
        "answers": [resps[0] for resps in first["resps"]],
        "read_as": {sample["filter"]: sample["filtered_resps"] for sample in of_item},
        "right": str(first["target"]),
        "values": _values_of(of_item),
    }


def _has_choices(arguments: Sequence[Sequence[Any]]) -> bool:
    """Whether a question's requests are choices: not answers, with their settings, nor texts that are scored whole."""
    return len(arguments[0]) > 1 and isinstance(arguments[0][1], str)
