"""The columns of the paper's tables (UFT, arXiv 2410.21438): which metrics of which tasks each of them shows.

The paper's averages are plain means of six shares. The leaderboards' own pages rescale each task against guessing, so
their averages are other numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace

NEW, OLD = "new leaderboard", "old leaderboard"


@dataclass(frozen=True)
class Column:
    """The mean of some metrics of one task.

    board: whose average the column is part of. is_share: of right answers or of won comparisons; shown as a percentage.
    is_taxed: an ability that alignment can cost, so that it counts for the alignment tax.
    """

    name: str
    task: str
    metrics: tuple[str, ...]
    board: str | None = None
    is_share: bool = True
    is_taxed: bool = True


_IFEVAL = tuple(f"{level}_level_{way}_acc" for level in ("prompt", "inst") for way in ("strict", "loose"))
PAPER = (
    Column("bbh", "leaderboard_bbh", ("acc_norm",), NEW),
    Column("gpqa", "leaderboard_gpqa", ("acc_norm",), NEW),
    Column("mmlu-pro", "leaderboard_mmlu_pro", ("acc",), NEW),
    Column("musr", "leaderboard_musr", ("acc_norm",), NEW),
    Column("ifeval", "leaderboard_ifeval", _IFEVAL, NEW),
    Column("math-hard", "leaderboard_math_hard", ("exact_match_original",), NEW),
    Column("gsm8k", "gsm8k", ("exact_match,strict-match", "exact_match,flexible-extract"), OLD),
    Column("truthful", "truthfulqa_mc2", ("acc",), OLD),
    Column("winogrande", "winogrande", ("acc",), OLD),
    Column("arc", "arc_challenge", ("acc_norm",), OLD),
    Column("hellaswag", "hellaswag", ("acc_norm",), OLD),
    Column("mmlu", "mmlu", ("acc",), OLD),
    Column("ifeval", "ifeval", _IFEVAL),  # behind both boards, which the tables put their averages behind
    Column("MT-Bench", "mt_bench", ("grade",), is_share=False, is_taxed=False),
    Column("AlpacaEval LC", "alpaca_eval", ("length_controlled_win_rate",), is_taxed=False),
    Column("AlpacaEval", "alpaca_eval", ("win_rate",), is_taxed=False),
    Column("length", "alpaca_eval", ("average_characters",), is_share=False, is_taxed=False),
)
"""`exact_match_original` is what `exact_match` of math-hard was when the paper was written. `ifeval` is the harness's
own task of leaderboard_ifeval's questions, which counts for no leaderboard."""


def plain_metric(name: str) -> str:
    """lm-evaluation-harness writes `acc,none` where a task has no filters."""
    return name.removesuffix(",none")


def columns_for(tasks: Iterable[tuple[str, Sequence[str]]], parts: Collection[str] = ()) -> list[Column]:
    """The paper's columns that the tasks can fill, and one for the first metric of each other task; no two of one name.

    Args:
        tasks: name and metrics of each, in the order of their columns.
        parts: tasks and groups that another group is the mean of, which have no column: mmlu has 57 and 4.
    """
    found = {task: [plain_metric(metric) for metric in metrics] for task, metrics in tasks}
    paper: list[Column] = []
    for column in PAPER:
        if column.task in found and all(metric in found[column.task] for metric in column.metrics):
            is_taken = any(other.name == column.name for other in paper)
            paper.append(replace(column, name=f"task {column.task}") if is_taken else column)
    known = {column.task for column in paper}
    taken = {column.name for column in paper}  # `bbh` of the paper is leaderboard_bbh, and there is a task bbh
    others = [
        Column(
            f"task {task}" if task in taken else task,
            task,
            (metrics[0],),
            is_share=_is_share(metrics[0]),
            is_taxed=_is_share(metrics[0]),
        )
        for task, metrics in found.items()
        if task not in known and metrics and task not in parts
    ]
    return [*paper, *others]


def board_averages(value_of: Callable[[Column], float | None]) -> dict[str, float]:
    """The plain mean of a board's columns, by board; only of a board that has them all.

    Args:
        value_of: a column's value; None where it is missing.
    """
    found = {}
    for board in (NEW, OLD):
        values = [value_of(column) for column in PAPER if column.board == board]
        known = [value for value in values if value is not None]
        if len(known) == len(values):
            found[board] = sum(known) / len(known)
    return found


def _is_share(metric: str) -> bool:
    return metric.startswith(("acc", "exact_match")) or metric.endswith("_acc")
