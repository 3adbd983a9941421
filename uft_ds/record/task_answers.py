"""tasks.jsonl: the policy's answers to the prompts of `evaluate.tasks`, and what they were graded."""

from __future__ import annotations

import json
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from uft_ds.host.files import write_atomically


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
    """Write the answers of a step after those of earlier steps; answers of this and later steps are replaced.

    A resumed run may find answers of steps that it makes again.
    """
    _write(path, [*(answer for answer in read_task_answers(path) if answer.step < step), *answers])


def cut_task_answers(path: Path, step: int) -> None:
    """Remove answers of steps after this one, if there is a file."""
    if path.exists():
        _write(path, [answer for answer in read_task_answers(path) if answer.step <= step])


def read_task_answers(path: Path) -> list[TaskAnswer]:
    """All answers of a run; none if there is no file. Damaged lines are left out."""
    if not path.exists():
        return []
    found = (_parsed(line) for line in path.read_bytes().split(b"\n"))
    return [answer for answer in found if answer is not None]


def _write(path: Path, answers: Iterable[TaskAnswer]) -> None:
    write_atomically(path, (json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in answers))


def _parsed(line: bytes) -> TaskAnswer | None:
    try:
        found = json.loads(line.decode("utf-8"))
        answer = TaskAnswer(**{field.name: found[field.name] for field in fields(TaskAnswer)})
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    texts = (answer.task, answer.origin, answer.prompt, answer.answer, answer.reason)
    is_whole = type(answer.step) is int and type(answer.ended) is bool
    is_graded = answer.score is None or type(answer.score) in (int, float)
    return answer if is_whole and is_graded and all(isinstance(text, str) for text in texts) else None
