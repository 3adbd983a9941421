"""samples.jsonl: answers of the policy to a few held-out prompts, in the course of a run."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path

from uft_ds.record.lines_of_steps import cut_after, read_lines, write_step


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


def write_samples(path: Path, step: int, samples: Seq[Sample]) -> None:
    """Write the samples of a step after those of earlier steps; samples of this and later steps are replaced."""
    write_step(path, step, samples, Sample, _is_whole)


def cut_samples(path: Path, step: int) -> None:
    """Remove samples of steps after this one, if there is a file."""
    cut_after(path, step, Sample, _is_whole)


def read_samples(path: Path) -> list[Sample]:
    """All samples of a run; none if there is no file. Damaged lines are left out."""
    return read_lines(path, Sample, _is_whole)


def _is_whole(sample: Sample) -> bool:
    texts = (sample.origin, sample.kind, sample.prompt, sample.response, sample.answer)
    is_whole = type(sample.step) is int and type(sample.score) in (int, float) and type(sample.ended) is bool
    return is_whole and all(isinstance(text, str) for text in texts)
