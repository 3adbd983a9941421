"""Rows in a folder: which file each split is, what is missing, and the task file that the harness is given."""

from __future__ import annotations

import json
from pathlib import Path

import needs
import pytest
import yaml

from uft_ds.errors import UserError
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
