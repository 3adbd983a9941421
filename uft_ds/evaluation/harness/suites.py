"""Sets of tasks with the shots and metrics of the paper (arXiv 2410.21438), which are those of both leaderboards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from uft_ds.errors import UserError
from uft_ds.evaluation.columns import PAPER, Column, board_averages, plain_metric


@dataclass(frozen=True)
class AskedTask:
    """A task, or a group of tasks, that is asked for.

    shots: examples in each prompt; None: as the task's own file says.
    """

    task: str
    shots: int | None = None


@dataclass(frozen=True)
class Suite:
    """limit: questions of each task where no other limit is given; None: all."""

    name: str
    asked: tuple[AskedTask, ...]
    limit: int | None = None


QUICK_LIMIT = 100
_LONGEST_NAME = 100
SUITES: Mapping[str, Suite] = {
    suite.name: suite
    for suite in (
        Suite(
            "leaderboard",
            (
                AskedTask("leaderboard_bbh", 3),
                AskedTask("leaderboard_gpqa", 0),
                AskedTask("leaderboard_mmlu_pro", 5),
                AskedTask("leaderboard_musr", 0),
                AskedTask("leaderboard_ifeval", 0),
                AskedTask("leaderboard_math_hard", 4),
            ),
        ),
        Suite(
            "openllm",
            (
                AskedTask("gsm8k", 5),
                AskedTask("truthfulqa_mc2", 0),
                AskedTask("winogrande", 5),
                AskedTask("arc_challenge", 25),
                AskedTask("hellaswag", 10),
                AskedTask("mmlu", 5),
            ),
        ),
        Suite(
            "quick",
            (
                AskedTask("ifeval", 0),
                AskedTask("gsm8k", 5),
                AskedTask("truthfulqa_mc2", 0),
                AskedTask("arc_challenge", 25),
            ),
            limit=QUICK_LIMIT,
        ),
    )
}


def suite_of(given: str) -> Suite:
    """A suite by its name, or one of the tasks in a list such as `gsm8k,arc_challenge=5`, the shots behind each.

    Tasks of the paper get the paper's shots where none are given, others those of their own files.

    Raises:
        UserError: the list is empty, names a task twice, or has shots that are no number.
    """
    if given in SUITES:
        return SUITES[given]
    of_paper = {asked.task: asked for suite in SUITES.values() for asked in suite.asked}
    found: dict[str, AskedTask] = {}
    for part in given.split(","):
        name, has_shots, shots = (text.strip() for text in part.partition("="))
        if not name or (has_shots and not (shots.isdecimal() and len(shots) < 4)):
            raise UserError(
                f"--suite: found {part!r} in {given!r}; expected {', '.join(SUITES)}, or tasks such as "
                "gsm8k,arc_challenge=25, where the number is that of the examples in each prompt"
            )
        if name in found:
            raise UserError(f"--suite: {name} stands twice in {given!r}; name each task once")
        found[name] = AskedTask(name, int(shots)) if has_shots else of_paper.get(name, AskedTask(name))
    names = "+".join(Path(name).stem if name.endswith(".yaml") else name for name in found)
    return Suite(names[:_LONGEST_NAME], tuple(found.values()))


def paper_columns(measured: Mapping[str, tuple[Mapping[str, float], int | None]]) -> dict[str, float]:
    """The numbers that the paper's tables show, by column, as far as they were measured with the paper's shots.

    Behind them the average of each board that is complete.

    Args:
        measured: metrics and shots by task. None: the shots are not known, or those of a group's tasks differ.
    """
    shots = {asked.task: asked.shots for suite in SUITES.values() for asked in suite.asked}
    known = {
        task: {plain_metric(metric): value for metric, value in metrics.items()}
        for task, (metrics, of_task) in measured.items()
        if task in shots and of_task == shots[task]
    }

    def value_of(column: Column) -> float | None:
        metrics = known.get(column.task, {})
        values = [metrics[metric] for metric in column.metrics if metric in metrics]
        return sum(values) / len(values) if len(values) == len(column.metrics) else None

    found: dict[str, float] = {}
    for column in PAPER:
        if (value := value_of(column)) is not None:
            found.setdefault(column.name, value)
    return found | {f"average, {board}": value for board, value in board_averages(value_of).items()}
