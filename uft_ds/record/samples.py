"""samples.jsonl: answers of the policy to a few held-out prompts, in the course of a run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sample:
    """One answer.

    step: number of optimiser steps before it; 0: the policy as it starts.
    origin: `file:line` of the held-out row. kind, score: of the row's response.
    prompt, response: of the row, as the model reads them, without special tokens.
    answer: of the policy, by greedy decoding.
    ended: whether the answer ended by itself; otherwise it was cut at `train.sample_tokens`.
    """

    step: int
    origin: str
    kind: str
    score: float
    prompt: str
    response: str
    answer: str
    ended: bool


@dataclass(frozen=True)
class Trained:
    """Answers of the policy to one prompt, on which a step of an online run has trained.

    step: the number of the step. prompt: its last turn. answers: text and score of each.
    """

    step: int
    origin: str
    prompt: str
    answers: tuple[tuple[str, float], ...]
