"""tasks.jsonl: the policy's answers to the prompts of `evaluate.tasks`, and what they were graded."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path

from uft_ds.record.lines_of_steps import cut_after, read_lines, write_step


@dataclass(frozen=True)
class TaskAnswer:
    """One answer.

    step: number of optimiser steps before it; 0: the policy as it starts.
    task: the task's name. origin: `file:line` of the prompt. prompt: its last turn.
    score: from 0 to 1; None: there is none, and `reason` says why.
    ended: whether the answer ended by itself; otherwise it was cut at the task's `max_new_tokens`.
    """

    step: int
    task: str
    origin: str
    prompt: str
    answer: str
    score: float | None
    reason: str
    ended: bool


def write_task_answers(path: Path, step: int, answers: Seq[TaskAnswer]) -> None:
    """Write the answers of a step after those of earlier steps; answers of this and later steps are replaced."""
    write_step(path, step, answers, TaskAnswer, _is_whole)


def cut_task_answers(path: Path, step: int) -> None:
    """Remove answers of steps after this one, if there is a file."""
    cut_after(path, step, TaskAnswer, _is_whole)


def read_task_answers(path: Path) -> list[TaskAnswer]:
    """All answers of a run; none if there is no file. Damaged lines are left out."""
    return read_lines(path, TaskAnswer, _is_whole)


def _is_whole(answer: TaskAnswer) -> bool:
    texts = (answer.task, answer.origin, answer.prompt, answer.answer, answer.reason)
    is_whole = type(answer.step) is int and type(answer.ended) is bool
    is_graded = answer.score is None or type(answer.score) in (int, float)
    return is_whole and is_graded and all(isinstance(text, str) for text in texts)
