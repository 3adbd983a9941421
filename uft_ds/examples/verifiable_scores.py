"""A scorer for online runs on the verifiable tasks: `score_by: code:uft_ds.examples.verifiable_scores:score`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from uft_ds.examples.verifiable_tasks import Task, grade


def score(messages: Sequence[Mapping[str, Any]], response: str, meta: Mapping[str, Any]) -> float:
    """The grade of a response, from 0 to 1, by the rule that grades the quickstart's held-out answers.

    Args:
        messages: the last one is the task's prompt. meta: its `kind` and its one right `answer`.
    """
    return grade(Task(meta["kind"], messages[-1]["content"], meta["answer"]), response)
