"""tasks.jsonl: the policy's answers to the prompts of `evaluate.tasks`, and what they were graded."""

from __future__ import annotations

from dataclasses import dataclass


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
