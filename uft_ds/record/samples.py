"""samples.jsonl: answers of the policy to a few held-out prompts, in the course of a run."""

from __future__ import annotations

import json
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from uft_ds.host.files import write_atomically


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
    """Write the samples of a step after those of earlier steps; samples of this and later steps are replaced.

    A resumed run may find samples of steps that it makes again.
    """
    _write(path, [*(sample for sample in read_samples(path) if sample.step < step), *samples])


def cut_samples(path: Path, step: int) -> None:
    """Remove samples of steps after this one, if there is a file."""
    if path.exists():
        _write(path, [sample for sample in read_samples(path) if sample.step <= step])


def read_samples(path: Path) -> list[Sample]:
    """All samples of a run; none if there is no file. Damaged lines are left out."""
    if not path.exists():
        return []
    found = [_parsed(line) for line in path.read_bytes().split(b"\n")]
    return [sample for sample in found if sample is not None]


def _write(path: Path, samples: Seq[Sample]) -> None:
    write_atomically(path, "".join(json.dumps(asdict(sample), ensure_ascii=False) + "\n" for sample in samples))


def _parsed(line: bytes) -> Sample | None:
    try:
        found: dict[str, Any] = json.loads(line.decode("utf-8"))
        sample = Sample(**{field.name: found[field.name] for field in fields(Sample)})
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    texts = (sample.origin, sample.kind, sample.prompt, sample.response, sample.answer)
    is_whole = type(sample.step) is int and type(sample.score) in (int, float) and type(sample.ended) is bool
    return sample if is_whole and all(isinstance(text, str) for text in texts) else None
