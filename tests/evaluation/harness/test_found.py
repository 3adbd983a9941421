"""What becomes of the harness's results: numbers of tasks and groups, and values of questions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from uft_ds.evaluation.harness.found import item_results, task_results, write_samples
from uft_ds.evaluation.harness.shown import tables
from uft_ds.evaluation.harness.suites import paper_columns
from uft_ds.evaluation.results import Evaluation

MATH, PARTS = "leaderboard_math_hard", ("leaderboard_math_algebra_hard", "leaderboard_math_geometry_hard")


def of_harness() -> dict[str, Any]:
    """As `evaluate` returns them: MATH-hard of two subjects, and GSM8K, which reads an answer in two ways."""
    return {
        "results": {
            PARTS[0]: {"alias": "a", "exact_match,none": 0.5, "exact_match_original,none": 0.25, "sample_len": 4},
            PARTS[1]: {"alias": "g", "exact_match,none": 0.0, "exact_match_original,none": 1.0, "sample_len": 1},
            MATH: {"alias": "m", "exact_match,none": 0.4, "exact_match_stderr,none": 0.1},
            "gsm8k": {"exact_match,strict-match": 0.5, "exact_match,flexible-extract": 1.0, "x_stderr,y": 0.1},
        },
        "group_subtasks": {MATH: list(PARTS)},
        "versions": {PARTS[0]: 3.0, PARTS[1]: 3.0, "gsm8k": 3.0},
        "n-shot": {PARTS[0]: 4, PARTS[1]: 4, "gsm8k": 5},
        "n-samples": {PARTS[0]: {"effective": 4}, PARTS[1]: {"effective": 1}, "gsm8k": {"effective": 2}},
        "samples": {
            "gsm8k": [
                {
                    "doc_id": doc, "doc_hash": f"{doc:064x}", "filter": how, "metrics": ["exact_match"],
                    "exact_match": np.float64(doc) if how == "strict-match" else 1, "target": "7",
                    "arguments": [("Q: how many?\nA:", {"until": ["\n"]})], "resps": [[" 7"]], "filtered_resps": ["7"],
                }
                for how in ("strict-match", "flexible-extract") for doc in (0, 1)
            ]
        },
    }  # fmt: skip


def test_a_group_has_the_metric_that_the_harness_leaves_out() -> None:
    """`exact_match_original` of MATH-hard: (4 x 0.25 + 1 x 1.0) / 5 = 0.4; errors are no metrics."""
    found = {task.task: task for task in task_results(of_harness())}
    assert found[MATH].metrics == {"exact_match,none": 0.4, "exact_match_original,none": pytest.approx(0.4)}
    assert (found[MATH].items, found[MATH].shots, found[MATH].parts) == (5, 4, PARTS)
    assert found["gsm8k"].metrics == {"exact_match,strict-match": 0.5, "exact_match,flexible-extract": 1.0}
    assert (found["gsm8k"].items, found["gsm8k"].shots, found["gsm8k"].version) == (2, 5, "3.0")


@pytest.mark.parametrize(("of_last", "shots"), [(5, 5), (0, None)])
def test_a_group_of_groups_has_the_shots_of_all_its_tasks(of_last: int, shots: int | None) -> None:
    """The harness tells those of a group's own tasks alone; tasks of other shots have none together."""
    results: dict[str, Any] = {
        "results": {name: {"acc,none": 0.5} for name in ("mmlu", "mmlu_stem", "mmlu_other", "a", "b", "c")},
        "group_subtasks": {"mmlu": ["mmlu_stem", "mmlu_other"], "mmlu_stem": ["a", "b"], "mmlu_other": ["c"]},
        "versions": {},
        "n-shot": {"a": 5, "b": 5, "c": of_last},
        "n-samples": {name: {"effective": 1} for name in "abc"},
    }
    found = {task.task: task for task in task_results(results)}
    assert (found["mmlu"].shots, found["mmlu"].parts) == (shots, ("a", "b", "c"))
    assert found["mmlu_stem"].shots == 5
    measured = {name: (task.metrics, task.shots) for name, task in found.items()}
    assert (paper_columns(measured) == {"mmlu": 0.5}) == (shots == 5)


def test_columns_of_the_paper_stand_behind_the_tasks(tmp_path: Path) -> None:
    """GSM8K (0.5 + 1) / 2 = 75 %, MATH-hard 40 %; no mean of some columns, which the paper has none of."""
    found = Evaluation("m", {}, {}, task_results(of_harness()))
    of_paper = tables(found, tmp_path)[1]
    cells = dict(zip(*(list(column.cells) for column in of_paper.columns), strict=True))
    assert cells == {"math-hard": "40.00", "gsm8k": "75.00"}


def test_a_question_has_one_line_with_all_ways_to_read_its_answer() -> None:
    """Under the names of the task's metrics, by an id of its place and content."""
    (first, second) = item_results(of_harness())["gsm8k"]
    assert first.item == f"0-{'0' * 16}"
    assert first.values == {"exact_match,strict-match": 0.0, "exact_match,flexible-extract": 1.0}
    assert second.values["exact_match,strict-match"] == 1.0


def test_lists_are_no_values() -> None:
    """IFEval's values by instruction have no mean that is the task's."""
    results = of_harness()
    for sample in results["samples"]["gsm8k"]:
        sample["metrics"] = ["exact_match", "by_instruction"]
        sample["by_instruction"] = [True, False]
    assert set(item_results(results)["gsm8k"][0].values) == {"exact_match,strict-match", "exact_match,flexible-extract"}


def test_samples_can_be_looked_at(tmp_path: Path) -> None:
    """The prompt's end, the answer, how it was read, and what is right."""
    write_samples(tmp_path, of_harness())
    first = json.loads((tmp_path / "samples" / "gsm8k.jsonl").read_text().split("\n")[0])
    assert (first["prompt_end"], first["answers"], first["right"]) == ("Q: how many?\nA:", [" 7"], "7")
    assert first["read_as"] == {"strict-match": ["7"], "flexible-extract": ["7"]}
    assert first["choices"] is None
