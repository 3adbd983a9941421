"""A model's graded answers to the quickstart's held-out tasks, and the tables that compare two models by them."""

from __future__ import annotations

import json
import resource
import shutil
import sys
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from uft_ds.errors import CheckFailed
from uft_ds.evaluation.generate import generate_responses, load_for_generation
from uft_ds.examples.verifiable import Task, grade, is_correct
from uft_ds.host.files import write_atomically

MAX_NEW_TOKENS = 32


@dataclass(frozen=True)
class Answer:
    """A model's response to a held-out task, graded by the rule that gave the training scores."""

    kind: str
    prompt: str
    expected: str
    response: str
    grade: float
    correct: bool


def answers_of(model_folder: Path, tasks: tuple[Task, ...], console: Console) -> list[Answer]:
    """The model's greedy answers to the tasks, graded; progress goes to the console."""
    model, tokenizer = load_for_generation(model_folder)
    prompts = [[{"role": "user", "content": task.prompt}] for task in tasks]
    columns = (TextColumn("answering"), BarColumn(bar_width=20), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("answering", total=len(prompts))

        def answered(count: int) -> None:
            progress.advance(bar, count)
            if not console.is_terminal:
                console.print(f"  {int(progress.tasks[bar].completed)}/{len(prompts)} answered")

        responses = generate_responses(model, tokenizer, prompts, max_new_tokens=MAX_NEW_TOKENS, on_batch=answered)
    return graded(tasks, responses)


def graded(tasks: tuple[Task, ...], responses: list[str]) -> list[Answer]:
    """Responses with the grades by the rule that gave the training scores."""
    return [
        Answer(task.kind, task.prompt, task.answer, response, grade(task, response), is_correct(task, response))
        for task, response in zip(tasks, responses, strict=True)
    ]


def compared(before: Seq[Answer], after: Seq[Answer], seconds: float) -> dict[str, Any]:
    """What a quickstart has measured, as plain JSON values. seconds: of the whole quickstart."""
    return {
        "held_out_prompts": len(after),
        "correct_before": sum(answer.correct for answer in before),
        "correct_after": sum(answer.correct for answer in after),
        "mean_grade_before": sum(answer.grade for answer in before) / len(before),
        "mean_grade_after": sum(answer.grade for answer in after) / len(after),
        "seconds": round(seconds),
        "peak_memory_gib": _peak_gib(),
        "before": [asdict(answer) for answer in before],
        "after": [asdict(answer) for answer in after],
    }


def _peak_gib() -> dict[str, float]:
    """Peak memory in GiB of this process, and of its largest child process (a rank)."""
    usage = {"this_process": resource.RUSAGE_SELF, "largest_rank": resource.RUSAGE_CHILDREN}
    return {name: round(resource.getrusage(who).ru_maxrss / 2**20, 2) for name, who in usage.items()}


RESULT = "quickstart.json"
"""File in the run's folder with all answers; a quickstart that has not written it is not finished."""


def finish(console: Console, before: Seq[Answer], after: Seq[Answer], result: Mapping[str, Any], run: Path) -> None:
    """Write the result into the run's folder, and show it.

    Args:
        result: as by `compared`.
    Raises:
        CheckFailed: the held-out score did not rise.
    """
    write_atomically(run / RESULT, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    _show(console, before, after, result, run)
    if not result["mean_grade_after"] > result["mean_grade_before"]:
        raise CheckFailed(f"the verified held-out score did not rise; see {run / RESULT}")


def _show(console: Console, before: Seq[Answer], after: Seq[Answer], result: Mapping[str, Any], run: Path) -> None:
    samples = Table("prompt", "before", "after", title="samples, never trained on", show_lines=True)
    shown: set[str] = set()
    for old, new in zip(before, after, strict=True):
        if new.kind not in shown and len(shown) < 5:
            shown.add(new.kind)
            samples.add_row(Text(old.prompt), Text(old.response), Text(new.response))
    console.print(samples)
    kinds = Table("kind", "before", "after", title="verified answers on held-out prompts")
    for kind in sorted({answer.kind for answer in before}):
        counts = [[a.correct for a in answers if a.kind == kind] for answers in (before, after)]
        kinds.add_row(kind, *(f"{sum(c)}/{len(c)}" for c in counts))
    total = result["held_out_prompts"]
    kinds.add_row("all", f"{result['correct_before']}/{total}", f"{result['correct_after']}/{total}", style="bold")
    grades = (f"{result['mean_grade_before']:.2f}", f"{result['mean_grade_after']:.2f}")
    kinds.add_row("mean grade", *grades, style="bold")
    console.print(kinds)
    minutes, rest = divmod(result["seconds"], 60)
    memory = result["peak_memory_gib"]
    made = Table.grid(padding=(0, 2))
    for name, path in (
        ("the run", run),
        ("curves", run / "curves.png"),
        ("report", run / "report.html"),
        ("the merged model", run / "merged"),
        ("all answers", run / RESULT),
    ):
        made.add_row(name, str(path))
    made.add_row("time", f"{minutes} min {rest} s; peak memory of a rank {memory['largest_rank']} GiB")
    console.print(made)
    if result["mean_grade_after"] > result["mean_grade_before"]:
        console.print(
            f"It worked: of {total} prompts that it never saw, {result['correct_after']} are answered exactly right "
            f"({result['correct_before']} before).",
            highlight=False,
        )
    command = "uft" if shutil.which("uft") else sys.argv[0]  # `make quickstart` activates no environment
    console.print(f'Talk to it:  {command} chat {run / "merged"} --prompt "..."', highlight=False)
