"""MT-Bench's files, in the layouts of FastChat's `llm_judge`.

question.jsonl          {"question_id": 81, "category": "writing", "turns": ["...", "..."], "reference": ["...", "..."]}
model_answer/M.jsonl    {"question_id": 81, "answer_id": "...", "model_id": "M", "choices": [{"index": 0, "turns":
                        ["...", "..."]}], "tstamp": 1686286924.8}; reference answers have the same layout
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uft_ds.errors import UserError
from uft_ds.evaluation.benchmarks.entries import checked_text, jsonl_entries, shown, text_of
from uft_ds.evaluation.benchmarks.question import Answer, Question

TURNS = 2
TEMPERATURES = {
    "writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0, "stem": 0.1,
    "humanities": 0.1,
}  # fmt: skip
"""By category, as FastChat's `llm_judge/common.py` has them (0.2.36)."""
OTHER_TEMPERATURE = 0.7
"""Of any other category, as there."""
MAX_NEW_TOKENS = 1024
"""Of an answer, as FastChat's `gen_model_answer.py` has it."""


def read_questions(path: Path) -> list[Question]:
    """The questions of a file, in its order.

    Raises:
        UserError: names file and line.
    """
    questions = []
    for place, entry in jsonl_entries(path, "--questions"):
        turns = _turns(entry.get("turns"), "turns", place)
        questions.append(Question(_id(entry, place), place, turns, text_of(entry, "category", place), entry))
    _check_once(((question.key, question.place) for question in questions), "question_id")
    if not questions:
        raise UserError(f"--questions {path}: holds no question")
    return questions


@dataclass(frozen=True)
class Given:
    """A model's answers to both turns of a question, of an answer file. place: `file:line`."""

    place: str
    model: str
    turns: tuple[str, ...]


def read_answers(path: Path, option: str) -> dict[int, Given]:
    """The answers of a file by question_id; the first choice where there are several.

    Args:
        option: which names the file, for messages.
    Raises:
        UserError: names file and line; or the answers are of several models.
    """
    found = {}
    places = []
    for place, entry in jsonl_entries(path, option):
        key, choices = _id(entry, place), entry.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], Mapping):
            raise UserError(f"{place}: choices: found {shown(choices)}, expected a list of {{index, turns}}")
        turns = _turns(choices[0].get("turns"), "choices[0].turns", place, may_be_empty=True)
        found[key] = Given(place, text_of(entry, "model_id", place), turns)
        places.append((key, place))
    _check_once(places, "question_id")
    models = {one.model for one in found.values()}
    if len(models) != 1:
        what = f"answers of {len(models)} models" if models else "no answer"
        raise UserError(f"{option} {path}: holds {what}, expected those of one model")
    return found


def answer_lines(answers: Iterable[Answer], model: str, at: float) -> Iterator[str]:
    """The lines of an answer file.

    Args:
        at: when they were made, seconds since 1970.
    """
    for answer in answers:
        # An id of the answer's own content: made again, the file is the same.
        said = json.dumps([model, answer.key, answer.turns])
        line = {
            "question_id": answer.key,
            "answer_id": hashlib.sha256(said.encode()).hexdigest()[:22],
            "model_id": model,
            "choices": [{"index": 0, "turns": list(answer.turns)}],
            "tstamp": at,
        }
        yield json.dumps(line, ensure_ascii=False) + "\n"


def _id(entry: Mapping[str, Any], place: str) -> int:
    value = entry.get("question_id")
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(f"{place}: question_id: found {shown(value)}, expected a whole number")
    return value


def _turns(value: Any, key: str, place: str, *, may_be_empty: bool = False) -> tuple[str, ...]:
    is_list = isinstance(value, list) and len(value) == TURNS
    if not is_list or not all(isinstance(turn, str) and (may_be_empty or turn.strip()) for turn in value):
        raise UserError(f"{place}: {key}: found {shown(value)}, expected a list of {TURNS} texts")
    return tuple(checked_text(turn, key, place) for turn in value)


def _check_once(keys: Iterable[tuple[int, str]], name: str) -> None:
    first: dict[int, str] = {}
    for key, place in keys:
        if key in first:
            raise UserError(f"{place}: {name} {key} stands at {first[key]} too; remove one of them")
        first[key] = place
