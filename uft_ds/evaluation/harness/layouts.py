"""Where the rows of lm-evaluation-harness's tasks lie in a data folder, and what each row must have.

Splits and columns are those of the data sets on the hub, which the harness's own task files read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from uft_ds.evaluation.harness import faults


@dataclass(frozen=True)
class Layout:
    """Where rows of some tasks of the harness lie in a data folder.

    task_files: of the harness, a pattern below its folder of tasks.
    files: a file for each split, below the data folder; {subset} is the task's `dataset_name`, {task} its name.
    asked: the splits that hold the questions, the best first: the next one is taken where a file is not there.
    examples: the split that examples in the prompt come from; None: they are in the harness.
    groups: names of groups that have all these tasks. columns: that each row must have. fault: what is wrong with a
    row that has them, in words.
    """

    task_files: str
    files: Mapping[str, str]
    asked: tuple[str, ...]
    columns: tuple[str, ...]
    examples: str | None = None
    groups: tuple[str, ...] = ()
    fault: Callable[[Mapping[str, Any]], str | None] = faults.none


def _splits(folder: str, *names: str) -> dict[str, str]:
    return {name: f"{folder}/{name}.jsonl" for name in names}


_IFEVAL = ("key", "prompt", "instruction_id_list", "kwargs")
LAYOUTS = (
    *(
        Layout(file, {"train": "ifeval/input_data.jsonl"}, ("train",), _IFEVAL, groups=groups, fault=faults.of_ifeval)
        for file, groups in (
            ("ifeval/ifeval.yaml", ()),
            ("leaderboard/ifeval/ifeval.yaml", ("leaderboard_instruction_following",)),
        )
    ),
    Layout(
        "gsm8k/gsm8k.yaml",
        _splits("gsm8k", "train", "test"),
        ("test",),
        ("question", "answer"),
        "train",
        fault=faults.of_gsm8k,
    ),
    Layout(
        "truthfulqa/truthfulqa_mc[12].yaml",
        {"validation": "truthfulqa/multiple_choice.jsonl"},
        ("validation",),
        ("question", "mc1_targets", "mc2_targets"),
        fault=faults.of_truthfulqa,
    ),
    Layout(
        "arc/arc_*.yaml",
        _splits("{task}", "train", "validation", "test"),
        ("test", "validation"),
        ("question", "choices", "answerKey"),
        "train",
        fault=faults.of_arc,
    ),
    Layout(
        "winogrande/default.yaml",
        _splits("winogrande", "train", "validation"),
        ("validation",),
        ("sentence", "option1", "option2", "answer"),
        "train",
        fault=faults.of_winogrande,
    ),
    Layout(
        "hellaswag/hellaswag.yaml",
        _splits("hellaswag", "train", "validation"),
        ("validation",),
        ("ctx_a", "ctx_b", "activity_label", "endings", "label"),
        "train",
        fault=faults.of_hellaswag,
    ),
    Layout(
        "mmlu/default/mmlu_*.yaml",
        _splits("mmlu/{subset}", "dev", "test"),
        ("test",),
        ("question", "choices", "answer"),
        "dev",
        ("mmlu",),
        fault=faults.of_mmlu,
    ),
    Layout(
        "leaderboard/bbh_mc/[a-z]*.yaml",
        {"test": "bbh/{subset}.jsonl"},
        ("test",),
        ("input", "target"),  # a few of the published targets are none of the choices
        groups=("leaderboard_bbh",),
    ),
    Layout(
        "leaderboard/math/math_*.yaml",
        {"test": "math/{subset}/test.jsonl"},
        ("test",),
        ("problem", "solution", "level"),
        groups=("leaderboard_math_hard",),
        fault=faults.of_math,
    ),
    Layout(
        "leaderboard/gpqa/gpqa_*.yaml",
        {"train": "gpqa/{subset}.jsonl"},
        ("train",),
        ("Question", "Correct Answer", *(f"Incorrect Answer {number}" for number in (1, 2, 3))),
        groups=("leaderboard_gpqa",),
    ),
    *(
        Layout(
            f"leaderboard/musr/musr_{name}.yaml",
            {name: f"musr/{name}.jsonl"},
            (name,),
            ("narrative", "question", "choices", "answer_choice"),
            groups=("leaderboard_musr",),
            fault=faults.of_musr,
        )
        for name in ("murder_mysteries", "object_placements", "team_allocation")
    ),
    Layout(
        "leaderboard/mmlu_pro/mmlu_pro.yaml",
        _splits("mmlu_pro", "validation", "test"),
        ("test",),
        ("question", "options", "answer"),
        "validation",
        fault=faults.of_mmlu_pro,
    ),
)
