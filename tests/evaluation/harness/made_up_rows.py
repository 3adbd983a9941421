"""Made-up rows of every task of both leaderboards, in the columns that the hub's data sets have.

The harness finds them where its own task files look, by `hub`, and `uft eval --data` in a folder, by `write`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from uft_ds.evaluation.harness import package

FIRST, SECOND, LAST = 7, 8, 9
_SURE = "I hope it is correct."
ANSWER = (
    f" Final Answer: The final answer is ${FIRST}$. {_SURE} The final answer is ${SECOND}$. {_SURE}\n"
    f"#### {FIRST} or {LAST}"
)
"""What the model of the tests says after each prompt that ends with a colon. `exact_match_original` of MATH and
`strict-match` of GSM8K read the first number, `exact_match` of MATH the second and `flexible-extract` the last."""
MUSR = ("murder_mysteries", "object_placements", "team_allocation")
INSTRUCTIONS: tuple[dict[str, dict[str, Any]], ...] = (
    {"punctuation:no_comma": {}, "change_case:english_lowercase": {}},
    {"keywords:forbidden_words": {"forbidden_words": ["or"]}},
    {"punctuation:no_comma": {}},
    {"length_constraints:number_words": {"relation": "at least", "num_words": 500}},
)
"""The answer follows half of the first, the second where its last line is left out, as loose metrics do, the third."""


@dataclass(frozen=True)
class DataSet:
    """hub: path and name. rows, files: by split; files below a data folder."""

    hub: tuple[str, str | None]
    rows: Mapping[str, Sequence[Mapping[str, Any]]]
    files: Mapping[str, str]


def write(sets: Sequence[DataSet], folder: Path) -> Path:
    """The rows as files of a data folder."""
    for one in sets:
        for split, file in one.files.items():
            path = folder / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in one.rows[split]))
    return folder


def hub(sets: Sequence[DataSet]) -> Any:
    """A stand-in for `datasets.load_dataset` that has these rows alone."""
    found = {one.hub: one.rows for one in sets}

    def load_dataset(path: str, name: str | None = None, **further: Any) -> datasets.DatasetDict:
        rows = found[path, name]
        return datasets.DatasetDict(
            {split: datasets.Dataset.from_list([dict(row) for row in of_split]) for split, of_split in rows.items()}
        )

    return load_dataset


def openllm() -> list[DataSet]:
    """Of the first leaderboard."""
    return [
        DataSet(
            ("openai/gsm8k", "main"),
            {"train": _rows(_gsm8k, 7, "train"), "test": _rows(_gsm8k, 4)},
            _files("gsm8k", "train", "test"),
        ),
        DataSet(
            ("truthfulqa/truthful_qa", "multiple_choice"),
            {"validation": _rows(_truthfulqa, 3)},
            {"validation": "truthfulqa/multiple_choice.jsonl"},
        ),
        DataSet(
            ("allenai/winogrande", "winogrande_xl"),
            {"train": _rows(_winogrande, 8, "train"), "validation": _rows(_winogrande, 7)},
            _files("winogrande", "train", "validation"),
        ),
        DataSet(
            ("allenai/ai2_arc", "ARC-Challenge"),
            {"train": _rows(_arc, 30, "train"), "validation": _rows(_arc, 1), "test": _rows(_arc, 5, "test")},
            _files("arc_challenge", "train", "test"),
        ),
        DataSet(
            ("Rowan/hellaswag", None),
            {"train": _rows(_hellaswag, 12, "train"), "validation": _rows(_hellaswag, 5)},
            _files("hellaswag", "train", "validation"),
        ),
        *(
            DataSet(
                ("cais/mmlu", subject),
                {"dev": _rows(_mmlu, 5, f"{subject} example"), "test": _rows(_mmlu, 1 + place % 2, subject)},
                _files(f"mmlu/{subject}", "dev", "test"),
            )
            for place, subject in enumerate(_subsets("mmlu/default/mmlu_*.yaml"))
        ),
    ]


def leaderboard() -> list[DataSet]:
    """Of the second one."""
    bbh = sorted((package.root() / "tasks" / "leaderboard" / "bbh_mc").glob("[a-z]*.yaml"))
    return [
        *(_bbh(package.read_task_file(path), 1 + place % 3) for place, path in enumerate(bbh)),
        *(
            DataSet(
                ("DigitalLearningGmbH/MATH-lighteval", subject),
                {"train": _rows(_math, 1, subject), "test": _rows(_math, 4 + place % 2, subject)},
                {"test": f"math/{subject}/test.jsonl"},
            )
            for place, subject in enumerate(_subsets("leaderboard/math/math_*.yaml"))
        ),
        *(
            DataSet(("Idavidrein/gpqa", name), {"train": _rows(_gpqa, count, name)}, {"train": f"gpqa/{name}.jsonl"})
            for count, name in enumerate(_subsets("leaderboard/gpqa/gpqa_*.yaml"), 3)
        ),
        DataSet(
            ("TAUR-Lab/MuSR", None),
            {name: _rows(_musr, count, name) for count, name in enumerate(MUSR, 2)},
            {name: f"musr/{name}.jsonl" for name in MUSR},
        ),
        DataSet(
            ("TIGER-Lab/MMLU-Pro", None),
            {"validation": _rows(_mmlu_pro, 6, "example"), "test": _rows(_mmlu_pro, 5)},
            _files("mmlu_pro", "validation", "test"),
        ),
        DataSet(
            ("wis-k/instruction-following-eval", None),
            {"train": _rows(_ifeval, len(INSTRUCTIONS))},
            {"train": "ifeval/input_data.jsonl"},
        ),
    ]


def _rows(row: Callable[[int, str], dict[str, Any]], count: int, of: str = "") -> list[dict[str, Any]]:
    """of: a word that makes the rows of this split or subset others than those of the next."""
    return [row(number, of) for number in range(count)]


def _files(folder: str, *splits: str) -> dict[str, str]:
    return {split: f"{folder}/{split}.jsonl" for split in splits}


def _subsets(pattern: str) -> list[str]:
    paths = sorted((package.root() / "tasks").glob(pattern))
    return [str(package.read_task_file(path)["dataset_name"]) for path in paths]


def _gsm8k(n: int, of: str) -> dict[str, Any]:
    right = n + 20 if of else (FIRST, LAST, FIRST, 1)[n]
    return {"question": f"What is {n} {of}?", "answer": f"So it is.\n#### {right}"}


def _truthfulqa(n: int, of: str) -> dict[str, Any]:
    choices = [f"{colour} {n}" for colour in ("red", "green", "blue", "grey")]
    return {
        "question": f"Which colour is number {n}?",
        "mc1_targets": {"choices": choices, "labels": [1, 0, 0, 0]},
        "mc2_targets": {"choices": choices, "labels": [1, 1, 0, 0]},
    }


def _winogrande(n: int, of: str) -> dict[str, Any]:
    sentence = f"The cup {of} was not in the box since the _ was {'big' if n % 2 else 'small'} {n}."
    return {"sentence": sentence, "option1": "cup", "option2": "box", "answer": str(1 + n % 2)}


def _arc(n: int, of: str) -> dict[str, Any]:
    label = list("1234" if n % 3 == 2 else "ABCD")  # the hub's rows have both
    text = [f"by heat {n}", f"by the cold wind {of}", f"it never is {n}", "by day"]
    choices = {"text": text, "label": label}
    return {"id": f"{of}_{n}", "question": f"How is ice {n} melted?", "choices": choices, "answerKey": label[n % 4]}


def _hellaswag(n: int, of: str) -> dict[str, Any]:
    a, b = f"A man {n} sits in a boat {of}.", "he" if n % 2 else ""
    return {
        "ind": n,
        "activity_label": "Rowing",
        "ctx_a": a,
        "ctx_b": b,
        "ctx": f"{a} {b}",
        "endings": [f"rows {n}.", "[title] is asleep now.", f"jumps into the water {n} times.", "sings"],
        "label": str(n % 4),
    }


def _mmlu(n: int, of: str) -> dict[str, Any]:
    choices = [f"{n + place} pieces" for place in range(4)]
    return {"question": f" What is {n} of {of}?", "subject": of, "choices": choices, "answer": (n + len(of)) % 4}


def _bbh(tree: Mapping[str, Any], count: int) -> DataSet:
    """tree: a task file. Each task has choices of its own, which stand there."""
    name, choices = tree["dataset_name"], tree["doc_to_choice"]
    rows = [{"input": f"{name} {n}", "target": choices[n % len(choices)]} for n in range(count)]
    return DataSet(("SaylorTwift/bbh", name), {"test": rows}, {"test": f"bbh/{name}.jsonl"})


def _math(n: int, of: str) -> dict[str, Any]:
    """Right by the one metric, by the other, by none, and one that is not hard, so that it is not asked."""
    right = (FIRST, SECOND, 1, SECOND, SECOND)[n]
    return {
        "problem": f"What is ${n} \\cdot x$ in {of}?",
        "level": "Level 4" if n == 3 else "Level 5",
        "solution": f"It is $\\boxed{{{right}}}$.",
        "type": of,
    }


def _gpqa(n: int, of: str) -> dict[str, Any]:
    wrong = {f"Incorrect Answer {place}": f" the {place} of {n} \n" for place in (1, 2, 3)}
    return {"Question": f"What of {n} in {of}?", "Correct Answer": f"all [title] {n}", **wrong, "Subdomain": None}


def _musr(n: int, of: str) -> dict[str, Any]:
    choices = ["Ann", "Bob", "a third person"][: 2 + n % 2]
    return {
        "narrative": f"In {of} {n} they met.\n\nThen one left.",
        "question": "Who left?",
        "choices": str(choices),
        "answer_index": n % 2,
        "answer_choice": choices[n % 2],
    }


def _mmlu_pro(n: int, of: str) -> dict[str, Any]:
    options = [f"{n + place} things" for place in range(3 + n)]
    return {"question": f"How many {of} in {n}?", "options": options, "answer": "ABCDEFGHIJ"[n], "answer_index": n}


def _ifeval(n: int, of: str) -> dict[str, Any]:
    given = INSTRUCTIONS[n]
    return {
        "key": 1000 + n,
        "prompt": f"Say {n} as you are told to:",
        "instruction_id_list": list(given),
        "kwargs": list(given.values()),
    }
