"""Rows in a folder: which file each split is, what is missing, and the task file that the harness is given."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import needs
import pytest
import yaml

from uft_ds.errors import UserError
from uft_ds.evaluation.harness import punkt
from uft_ds.evaluation.harness.local import content, has_another_split, local_tasks, looked_for
from uft_ds.evaluation.harness.rows import check_rows
from uft_ds.evaluation.harness.suites import SUITES, AskedTask

needs.installed("lm_eval", "pip install '.[eval]' brings it")


def files_in(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"question": name}) + "\n")
    return folder


def test_a_task_file_changes_where_rows_come_from_and_nothing_else(tmp_path: Path) -> None:
    """It includes the harness's own, which has prompts and metrics."""
    data = files_in(tmp_path / "data", "gsm8k/train.jsonl", "gsm8k/test.jsonl")
    (task,) = local_tasks(data, [AskedTask("gsm8k", 5)])
    task.write(tmp_path)
    tree = yaml.safe_load((tmp_path / "gsm8k.yaml").read_text())
    files = tree.pop("dataset_kwargs")["data_files"]
    assert files == {"train": str(data / "gsm8k/train.jsonl"), "test": str(data / "gsm8k/test.jsonl")}
    own = tree.pop("include")
    assert tree == {"task": "gsm8k", "dataset_path": "json", "dataset_name": None}
    assert yaml.safe_load(Path(own).read_text())["task"] == "gsm8k"


def test_a_group_is_all_its_tasks(tmp_path: Path) -> None:
    """57 subjects of MMLU, each with a folder of its own: two of them are not MMLU."""
    names = [f"mmlu/{name}/{split}.jsonl" for name in ("abstract_algebra", "virology") for split in ("dev", "test")]
    data = files_in(tmp_path, *names)
    with pytest.raises(UserError, match=r"mmlu/anatomy/test\.jsonl: no such file; mmlu_anatomy takes"):
        local_tasks(data, [AskedTask("mmlu", 5)])
    (task,) = local_tasks(data, [AskedTask("mmlu_virology", 5)])
    assert task.files["dev"] == data / "mmlu/virology/dev.jsonl"
    assert set(content([task], data)) == {"mmlu/virology/dev.jsonl", "mmlu/virology/test.jsonl"}


@pytest.mark.parametrize("task", sorted({asked.task for suite in SUITES.values() for asked in suite.asked}))
def test_each_task_of_the_suites_can_be_asked_from_files(task: str) -> None:
    """So that a whole board can be asked where there is no hub."""
    assert looked_for(task).startswith("looked for ")


def test_a_part_of_mmlu_is_its_subjects(tmp_path: Path) -> None:
    """The harness finds them by a tag; 12 of the 57 are social sciences."""
    with pytest.raises(UserError, match=r"looked for mmlu/econometrics/dev\.jsonl, .* and 18 more, of"):
        local_tasks(tmp_path, [AskedTask("mmlu_social_sciences", 5)])


def test_a_task_without_rows_is_left_to_the_hub(tmp_path: Path) -> None:
    """As long as one task has some."""
    data = files_in(tmp_path, "ifeval/input_data.jsonl")
    found = local_tasks(data, [AskedTask("leaderboard_ifeval", 0), AskedTask("leaderboard_gpqa", 0)])
    assert [task.name for task in found] == ["leaderboard_ifeval"]


def test_other_questions_than_the_tests_are_named(tmp_path: Path) -> None:
    """ARC without its test split is asked the questions of the validation split."""
    data = files_in(tmp_path, "arc_challenge/train.jsonl", "arc_challenge/validation.jsonl")
    (task,) = local_tasks(data, [AskedTask("arc_challenge", 25)])
    assert (task.asked, task.changes) == ("validation", {"test_split": None})
    assert has_another_split("arc_challenge", "validation")


@pytest.mark.parametrize(
    ("task", "split"),
    [
        ("arc_challenge", "test"),
        ("arc_challenge", "hub"),
        ("hellaswag", "validation"),
        ("leaderboard_gpqa_main", "train"),
        ("leaderboard_musr_team_allocation", "team_allocation"),
    ],
)
def test_questions_of_the_harness_are_comparable(task: str, split: str) -> None:
    """Whatever the hub's data set calls their split."""
    assert not has_another_split(task, split)


@pytest.mark.parametrize(
    ("files", "asked", "words"),
    [
        (
            ["other/gsm8k.jsonl"],
            AskedTask("gsm8k", 5),
            "rows of none of the tasks gsm8k\n  gsm8k: looked for gsm8k/train.jsonl, gsm8k/test.jsonl, of which none",
        ),
        (
            [],
            AskedTask("mmlu", 5),
            "mmlu: looked for mmlu/abstract_algebra/dev.jsonl, mmlu/abstract_algebra/test.jsonl, .* and 108 more, of",
        ),
        ([], AskedTask("sciq", 0), "sciq: nothing was looked for, as the layout of its files is not known"),
        (["gsm8k/train.jsonl"], AskedTask("gsm8k", 5), "gsm8k/test.jsonl: no such file; gsm8k takes its questions"),
        (["gsm8k/test.jsonl"], AskedTask("gsm8k", 5), "gsm8k/train.jsonl: no such file; .* the 5 examples .* gsm8k=0"),
    ],
)
def test_what_is_missing_is_named(files: list[str], asked: AskedTask, words: str, tmp_path: Path) -> None:
    """The file, what it is for, and what to do."""
    data = files_in(tmp_path, *files)
    with pytest.raises(UserError, match=words):
        local_tasks(data, [asked])


def test_without_examples_no_file_of_examples_is_needed(tmp_path: Path) -> None:
    """And the harness is told so."""
    data = files_in(tmp_path, "gsm8k/test.jsonl")
    (task,) = local_tasks(data, [AskedTask("gsm8k", 0)])
    assert task.changes == {"training_split": None, "fewshot_split": None}


def test_questions_alone_are_enough_where_there_are_no_examples(tmp_path: Path) -> None:
    """ARC has a validation split, which the harness would read for examples that nobody asks for."""
    data = files_in(tmp_path, "arc_challenge/test.jsonl")
    (task,) = local_tasks(data, [AskedTask("arc_challenge", 0)])
    assert task.changes == {"training_split": None, "fewshot_split": None, "validation_split": None}


RIGHT = json.dumps({"question": "q", "answer": "#### 1"})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"{RIGHT}\n{{oops\n", r"gsm8k/test\.jsonl:2: no JSON \(.*; gsm8k expects an object with question, answer"),
        (f"{RIGHT}\n\n[1]\n", r"test\.jsonl:3: found \[1\]; gsm8k expects an object"),
        (f'{RIGHT}\n{{"Question": "q", "answer": "1"}}\n', r"test\.jsonl:2: has no question, found Question, answer;"),
        ('{"question": null, "answer": "1"}', r"test\.jsonl:1: has no question"),
        ("\n", r"test\.jsonl: has no rows; gsm8k expects an object with question, answer in each line"),
    ],
)
def test_a_bad_row_is_named(text: str, words: str, tmp_path: Path) -> None:
    """By file and line; the harness would take a column that one row lacks for an empty text."""
    data = files_in(tmp_path, "gsm8k/test.jsonl")
    (data / "gsm8k" / "test.jsonl").write_text(text)
    with pytest.raises(UserError, match=words):
        check_rows(local_tasks(data, [AskedTask("gsm8k", 0)]))
    (data / "gsm8k" / "test.jsonl").write_text(f"{RIGHT}\n\n{RIGHT}")
    check_rows(local_tasks(data, [AskedTask("gsm8k", 0)]))


TARGETS = {"choices": ["a", "b"], "labels": [1, 0]}
MMLU = {"question": "q", "choices": ["a", "b", "c", "d"], "answer": 0}
GOOD = {
    "gsm8k": json.loads(RIGHT),
    "leaderboard_ifeval": {"key": 1, "prompt": "p", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
    "truthfulqa_mc2": {"question": "q", "mc1_targets": TARGETS, "mc2_targets": TARGETS},
    "arc_challenge": {"question": "q", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "2"},
    "winogrande": {"sentence": "The _ is.", "option1": "a", "option2": "b", "answer": "1"},
    "hellaswag": {"ctx_a": "a", "ctx_b": "", "activity_label": "l", "endings": ["x", "y"], "label": "1"},
    "mmlu_virology": MMLU,
    "leaderboard_mmlu_pro": {"question": "q", "options": ["a", "b"], "answer": "B"},
    "leaderboard_math_algebra_hard": {"problem": "p", "solution": "$\\boxed{1}$", "level": "Level 5"},
    "leaderboard_musr_team_allocation": {
        "narrative": "n",
        "question": "q",
        "choices": "['a', 'b']",
        "answer_choice": "a",
    },
}


@pytest.mark.parametrize(
    ("task", "change", "words"),
    [
        ("gsm8k", {"answer": "one"}, "answer: found 'one'; expected a text that ends with #### NUMBER; gsm8k could"),
        ("leaderboard_ifeval", {"kwargs": []}, "instruction_id_list and kwargs are not two lists of the same length"),
        ("leaderboard_ifeval", {"instruction_id_list": ["a:b"]}, "instruction_id_list: found 'a:b', of which IFEval"),
        ("truthfulqa_mc2", {"mc2_targets": TARGETS | {"labels": [1]}}, "mc2_targets: expected choices and labels"),
        ("truthfulqa_mc2", {"mc1_targets": TARGETS | {"labels": [0, 1]}}, "mc1_targets: found labels [0, 1]; expected"),
        ("arc_challenge", {"choices": ["a", "b"]}, "choices: expected text and label, two lists of the same length"),
        ("arc_challenge", {"answerKey": "B"}, "answerKey: found 'B'; expected one of ['1', '2']"),
        ("winogrande", {"sentence": "It is."}, "sentence: found 'It is.'; expected a _ in the place of the option"),
        ("winogrande", {"answer": 1}, 'answer: found 1; expected "1" or "2", a text'),
        ("hellaswag", {"endings": "x"}, "endings: found 'x'; expected a list"),
        ("hellaswag", {"label": "2"}, "label: found '2'; expected one of 0, 1"),
        ("mmlu_virology", {"choices": ["a"]}, "choices: found ['a']; expected a list of four"),
        ("mmlu_virology", {"answer": 4}, "answer: found 4; expected a number from 0 to 3, or a letter from A to D"),
        ("leaderboard_mmlu_pro", {"options": ["a"]}, "options: found ['a']; expected a list of at least two"),
        ("leaderboard_mmlu_pro", {"answer": "C"}, "answer: found 'C'; expected a number from 0 to 1, or a letter from"),
        ("leaderboard_math_algebra_hard", {"level": 5}, 'level: found 5; expected a text such as "Level 5"'),
        ("leaderboard_musr_team_allocation", {"choices": ["a"]}, "choices: found ['a']; expected a list that is writ"),
    ],
)
def test_a_row_that_could_not_be_graded_is_named(task: str, change: dict[str, Any], words: str, tmp_path: Path) -> None:
    """The harness would fail on it in the middle, or when all questions are answered, or count each answer as wrong."""
    if task in punkt.TASKS:
        punkt.provide(None)
    names = looked_for(task).removeprefix("looked for ").partition(", of which")[0].split(", ")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps(GOOD[task]) + "\n")
    check_rows(local_tasks(tmp_path, [AskedTask(task)]))
    with (tmp_path / names[-1]).open("a") as file:
        file.write(json.dumps(GOOD[task] | change) + "\n")
    with pytest.raises(UserError, match=re.escape(f"{names[-1]}:2: {words}")):
        check_rows(local_tasks(tmp_path, [AskedTask(task)]))
