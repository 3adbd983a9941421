"""What `uft eval` shows: how far it is, and the tables at the end, which are Markdown too."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.box import MARKDOWN
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from uft_ds.errors import UserError
from uft_ds.evaluation.harness.local import has_another_split
from uft_ds.evaluation.harness.planned import OnAnswered
from uft_ds.evaluation.harness.suites import paper_columns
from uft_ds.evaluation.results import Evaluation, TaskResult, read_items

_SECONDS_BETWEEN_LINES = 30.0
_KINDS = {"loglikelihood": "scoring choices", "loglikelihood_rolling": "scoring texts", "generate_until": "answering"}


@contextmanager
def shown_progress(console: Console) -> Iterator[OnAnswered]:
    """A bar on a terminal; elsewhere a line every half a minute, and at the beginning and the end of each kind."""
    if console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:,.0f} of {task.total:,.0f}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, transient=True) as bar:
            tasks = {}

            def advance(kind: str, done: int, total: int) -> None:
                if kind not in tasks:
                    tasks[kind] = bar.add_task(_KINDS[kind], total=total)
                bar.update(tasks[kind], completed=done, total=total)

            yield advance
        return
    last: dict[str, float] = {}

    def line(kind: str, done: int, total: int) -> None:
        now = time.monotonic()
        if kind not in last or done == total or now - last[kind] >= _SECONDS_BETWEEN_LINES:
            last[kind] = now
            console.print(f"{_KINDS[kind]}: {done:,} of {total:,}")

    yield line


def tables(found: Evaluation, folder: Path) -> list[Table]:
    """The numbers of each task, and of the paper's columns with the averages of whole leaderboards."""
    of_tasks = Table(box=MARKDOWN)
    for name in ("task", "version", "shots", "questions", "metric"):
        of_tasks.add_column(name)
    of_tasks.add_column("value", justify="right")
    of_tasks.add_column("+-", justify="right")
    for task in found.tasks:
        shots = "-" if task.shots is None else str(task.shots)
        errors = _standard_errors(task, folder)
        for metric, value in task.metrics.items():
            error = f"{errors[metric]:.4f}" if metric in errors else ""
            of_tasks.add_row(task.task, task.version, shots, f"{task.items:,}", metric, f"{value:.4f}", error)
    columns = paper_columns({task.task: (task.metrics, task.shots) for task in found.tasks})
    if not columns:
        return [of_tasks]
    of_paper = Table(box=MARKDOWN)
    of_paper.add_column("the paper's column")
    of_paper.add_column("%", justify="right")
    for name, value in columns.items():
        of_paper.add_row(name, f"{100 * value:.2f}")
    return [of_tasks, of_paper]


def in_words(found: Evaluation) -> list[str]:
    """What the numbers depend on, one line each."""
    said = found.settings
    template = "with the chat template" if said["chat_template"] else "without a chat template"
    turns = ", examples as turns of the conversation" if said["fewshot_as_multiturn"] else ""
    limit = "all questions" if said["limit"] is None else f"the first {said['limit']:,} questions of each task"
    lines = [
        f"{found.name}: {limit}, {template}{turns}, {said['dtype']}, seeds {said['seeds']}",
        ", ".join(f"{name} {version}" for name, version in said["versions"].items()),
    ]
    lines += [
        f"note: {name}: its questions are those of the {one['rows']} split: not comparable with published numbers"
        for name, one in said["tasks"].items()
        if has_another_split(name, one["rows"])
    ]
    if said["max_new_tokens"] is not None:
        lines.append(f"note: no answer has more than {said['max_new_tokens']:,} new tokens (--max-new-tokens)")
    lines += [
        f"warning: {task}: the prompts of {count:,} questions did not fit into the model's positions: their beginning "
        "was cut"
        for task, count in found.model.get("cut_prompts", {}).items()
    ]
    return lines


def _standard_errors(task: TaskResult, folder: Path) -> dict[str, float]:
    """Of the metrics that are means of the questions' values."""
    try:
        items = read_items(folder, task.task)
    except UserError:
        return {}
    found = {}
    for metric, mean in task.metrics.items():
        values = [one.values[metric] for one in items if metric in one.values]
        if len(values) == task.items > 1 and math.isclose(math.fsum(values) / len(values), mean, abs_tol=1e-9):
            variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
            found[metric] = math.sqrt(variance / len(values))
    return found
