"""MT-Bench's grades of single answers: what is graded, and what the grades amount to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from uft_ds.errors import UserError
from uft_ds.evaluation.benchmarks import mt_bench
from uft_ds.evaluation.benchmarks.question import Question
from uft_ds.evaluation.judging.prompts import Case
from uft_ds.evaluation.results import ItemResult, TaskResult
from uft_ds.scoring.item import Judgement

TASK = "mt_bench"
WITH_REFERENCE = ("math", "reasoning", "coding")
"""Categories whose answers are compared with a reference, as FastChat's `NEED_REF_CATS` has them."""


def cases_of(
    questions: Sequence[Question],
    answers: Mapping[int, mt_bench.Given],
    references: Mapping[int, mt_bench.Given] | None,
    names: tuple[Path, Path | None],
) -> list[Case]:
    """Both turns of each question, in order.

    Args:
        references: None: all are graded without one.
        names: the files of answers and of references, for messages.
    Raises:
        UserError: a question has no answer, an answer no question, or a question of math, reasoning or coding no
            reference.
    """
    cases = []
    for question in questions:
        if question.key not in answers:
            raise UserError(
                f"{question.place}: question {question.key} has no answer in {names[0]}; answer it, or take the first "
                "questions alone by --limit"
            )
        reference = None
        if references is not None and question.category in WITH_REFERENCE:
            if question.key not in references:
                raise UserError(
                    f"{question.place}: question {question.key}, {question.category}, has no reference in {names[1]}; "
                    "add one, or leave --references out: then all are graded without"
                )
            reference = references[question.key].turns
        given = answers[question.key].turns
        cases += [Case(question, given, turn, reference) for turn in range(1, mt_bench.TURNS + 1)]
    return cases


def check_known(questions: Sequence[Question], answers: Mapping[int, mt_bench.Given], path: Path) -> None:
    """Refuse an answer without a question. questions: all of the file, whatever the limit."""
    known = {question.key for question in questions}
    for key, given in answers.items():
        if key not in known:
            raise UserError(f"{given.place}: question_id {key} is not in {path}; give the questions that were answered")


def result_of(
    cases: Sequence[Case], judgements: Sequence[Judgement], *, judge: str, version: str
) -> tuple[TaskResult, list[ItemResult]]:
    """The grades: of a question the mean of its turns, of all the mean of the questions.

    A question of which a turn has no grade does not count in `grade` and in its category, and is no item; its other
    turn counts among its kind.
    """
    items = []
    by_turn: dict[str, list[float]] = {f"grade,turn_{turn}": [] for turn in range(1, mt_bench.TURNS + 1)}
    by_category: dict[str, list[float]] = {}
    for first in range(0, len(cases), mt_bench.TURNS):
        question = cases[first].question
        values = {
            f"grade,turn_{case.turn}": judgement.value
            for case, judgement in zip(cases[first:], judgements[first : first + mt_bench.TURNS], strict=False)
            if judgement.value is not None
        }
        for name, grade in values.items():
            by_turn[name].append(grade)
        if len(values) < mt_bench.TURNS:
            continue
        mean = fmean(values.values())
        by_category.setdefault(f"grade,{question.category}", []).append(mean)
        length = fmean(len(text) for text in cases[first].answers)
        items.append(
            ItemResult(
                str(question.key),
                {"grade": mean, **values, f"grade,{question.category}": mean, "average_characters": length},
            )
        )
    grades = [item.values["grade"] for item in items]
    lengths = [float(len(text)) for case in cases[:: mt_bench.TURNS] for text in case.answers]
    named = {"grade": grades, **by_turn, **by_category, "average_characters": lengths}
    metrics = {name: fmean(values) for name, values in named.items() if values}
    metrics["failed"] = fmean(judgement.value is None for judgement in judgements)
    return TaskResult(TASK, metrics, len(items), version, judge=judge), items
