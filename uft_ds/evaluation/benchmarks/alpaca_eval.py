"""AlpacaEval's files: lists of instructions, and of a model's outputs as `alpaca_eval --model_outputs` reads them.

questions    [{"instruction": "...", "dataset": "helpful_base"}, ...]    further keys may be there
outputs      [{"instruction": "...", "output": "...", "generator": "NAME", "dataset": "helpful_base"}, ...]
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from uft_ds.errors import UserError
from uft_ds.evaluation.benchmarks.entries import checked_text, list_entries, shown, text_of
from uft_ds.evaluation.benchmarks.question import Answer, Question

TEMPERATURE = 0.0
MAX_NEW_TOKENS = 2048


@dataclass(frozen=True)
class Output:
    """A model's answer to an instruction. place: where it stands, `file:line`."""

    place: str
    instruction: str
    output: str
    generator: str


def read_questions(path: Path) -> list[Question]:
    """The instructions of a file, in its order. A list of outputs is one of instructions, too.

    Raises:
        UserError: names file and line.
    """
    questions = []
    for number, (place, entry) in enumerate(list_entries(path, "--questions")):
        instruction = text_of(entry, "instruction", place)
        dataset = entry.get("dataset", "")
        if not isinstance(dataset, str):
            raise UserError(f"{place}: dataset: found {shown(dataset)}, expected a text")
        questions.append(Question(number, place, (instruction,), checked_text(dataset, "dataset", place), entry))
    if not questions:
        raise UserError(f"--questions {path}: holds no instruction")
    return questions


def read_outputs(path: Path, option: str) -> list[Output]:
    """A model's outputs, in the file's order.

    Args:
        option: which names the file, for messages.
    Raises:
        UserError: names file and line; or the outputs are of several models.
    """
    found = []
    for place, entry in list_entries(path, option):
        output = entry.get("output")
        if not isinstance(output, str):
            raise UserError(f"{place}: output: found {shown(output)}, expected a text")
        instruction, generator = (text_of(entry, key, place) for key in ("instruction", "generator"))
        found.append(Output(place, instruction, checked_text(output, "output", place), generator))
    names = {one.generator for one in found}
    if len(names) != 1:
        what = f"outputs of {len(names)} models" if names else "no output"
        raise UserError(f"{option} {path}: holds {what}, expected those of one (its `generator`)")
    return found


def outputs_text(questions: Sequence[Question], answers: Iterable[Answer], model: str) -> str:
    """The file of a model's outputs."""
    of: Mapping[int, Answer] = {answer.key: answer for answer in answers}
    entries = []
    for question in questions:
        entry = {"instruction": question.turns[0], "output": of[question.key].turns[0], "generator": model}
        entries.append(entry | ({"dataset": question.category} if question.category else {}))
    return json.dumps(entries, indent=2, ensure_ascii=False) + "\n"
