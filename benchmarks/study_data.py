"""The study's rows, the same prompts in every layout, and the sources of recipes that read them.

Not a benchmark itself: a part of benchmarks/study.py.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

UNTRAINED_KINDS = ("initials", "bold", "pipes")
TEST, VALIDATION = 15, 10
"""Held-out prompts of each kind."""
WATCHED_EACH = 10
"""Of so many validation prompts the runs themselves look at one, which nothing depends on."""


def write_data(folder: Path) -> None:
    """The same prompts four ways, and held-out ones by their use."""
    from uft_ds.examples.verifiable import TASK_KINDS, Row, flawed_response, generate, grade

    made = generate(1650, (TEST + VALIDATION) * len(TASK_KINDS), 0)
    rng = random.Random("study")
    folder.mkdir(parents=True, exist_ok=True)

    def write(name: str, lines: Iterable[str]) -> None:
        (folder / f"{name}.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")

    trained = [row for row in made.scored_rows if row.task.kind not in UNTRAINED_KINDS]
    write("instruction", (Row(row.task, row.task.answer).to_json() for row in trained))
    write("scored", (row.to_json() for row in trained))
    flawed = [row for row in trained if row.score is not None and row.score < 1.0]
    write(
        "pairs",
        (
            json.dumps({"prompt": row.task.prompt, "chosen": row.task.answer, "rejected": row.response})
            for row in flawed
        ),
    )
    by_kind: dict[str, list[Any]] = {}
    for task in made.held_out_tasks:
        by_kind.setdefault(task.kind, []).append(task)
    for name, start, stop, kinds in (
        ("test", 0, TEST, set(TASK_KINDS) - set(UNTRAINED_KINDS)),
        ("untrained", 0, TEST, set(UNTRAINED_KINDS)),
        ("validation", TEST, TEST + VALIDATION, set(TASK_KINDS) - set(UNTRAINED_KINDS)),
    ):
        tasks = [task for kind in TASK_KINDS if kind in kinds for task in by_kind[kind][start:stop]]
        write(name, (Row(task, task.answer).to_json() for task in tasks))
        if name == "validation":
            write("watched", (Row(task, task.answer).to_json() for task in tasks[::WATCHED_EACH]))
        if name == "test":
            both = [(task, text) for task in tasks for text in (task.answer, flawed_response(task, rng))]
            write("test_both", (Row(task, text, grade(task, text)).to_json() for task, text in both))


def source(data: Path, name: str, share: float) -> dict[str, Any]:
    """A source of a recipe that reads one of the files."""
    given: dict[str, Any] = {"format": "jsonl", "path": str(data / f"{name}.jsonl")}
    if name == "split":
        given |= {"path": str(data / "pairs.jsonl"), "pairs": "split"}
    if name == "prompts":
        given |= {
            "format": "prompts",
            "path": str(data / "scored.jsonl"),
            "columns": {"response": None, "score": None},
            "answers": 4,
            "score_by": "code:uft_ds.examples.verifiable_scores:score",
        }
    return given if share == 1.0 else given | {"share": share}
