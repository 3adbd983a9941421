"""Sets of tasks with the shots and metrics of the paper (arXiv 2410.21438), which are those of both leaderboards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from uft_ds.errors import UserError


@dataclass(frozen=True)
class Asked:
    """A task, or a group of tasks, that is asked for.

    shots: examples in each prompt; None: as the task's own file says.
    """

    task: str
    shots: int | None = None


@dataclass(frozen=True)
class Column:
    """A column of the paper's tables: the plain mean of some metrics of one task."""

    name: str
    task: str
    metrics: tuple[str, ...]


@dataclass(frozen=True)
class Suite:
    """limit: questions of each task where no other limit is given; None: all."""

    name: str
    asked: tuple[Asked, ...]
    limit: int | None = None


_IFEVAL = tuple(f"{unit}_level_{how}_acc,none" for how in ("strict", "loose") for unit in ("prompt", "inst"))
_GSM8K = ("exact_match,strict-match", "exact_match,flexible-extract")

COLUMNS = (
    Column("BBH", "leaderboard_bbh", ("acc_norm,none",)),
    Column("GPQA", "leaderboard_gpqa", ("acc_norm,none",)),
    Column("MMLU-Pro", "leaderboard_mmlu_pro", ("acc,none",)),
    Column("MuSR", "leaderboard_musr", ("acc_norm,none",)),
    Column("IFEval", "leaderboard_ifeval", _IFEVAL),
    Column("IFEval", "ifeval", _IFEVAL),
    Column("MATH-hard", "leaderboard_math_hard", ("exact_match_original,none",)),
    Column("GSM8K", "gsm8k", _GSM8K),
    Column("TruthfulQA", "truthfulqa_mc2", ("acc,none",)),
    Column("Winogrande", "winogrande", ("acc,none",)),
    Column("ARC", "arc_challenge", ("acc_norm,none",)),
    Column("HellaSwag", "hellaswag", ("acc_norm,none",)),
    Column("MMLU", "mmlu", ("acc,none",)),
)
"""`exact_match_original` is what `exact_match` of MATH-hard was when the paper was written."""

QUICK_LIMIT = 100
_LONGEST_NAME = 100
SUITES: Mapping[str, Suite] = {
    suite.name: suite
    for suite in (
        Suite(
            "leaderboard",
            (
                Asked("leaderboard_bbh", 3),
                Asked("leaderboard_gpqa", 0),
                Asked("leaderboard_mmlu_pro", 5),
                Asked("leaderboard_musr", 0),
                Asked("leaderboard_ifeval", 0),
                Asked("leaderboard_math_hard", 4),
            ),
        ),
        Suite(
            "openllm",
            (
                Asked("gsm8k", 5),
                Asked("truthfulqa_mc2", 0),
                Asked("winogrande", 5),
                Asked("arc_challenge", 25),
                Asked("hellaswag", 10),
                Asked("mmlu", 5),
            ),
        ),
        Suite(
            "quick",
            (Asked("ifeval", 0), Asked("gsm8k", 5), Asked("truthfulqa_mc2", 0), Asked("arc_challenge", 25)),
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
    found: dict[str, Asked] = {}
    for part in given.split(","):
        name, has_shots, shots = (text.strip() for text in part.partition("="))
        if not name or (has_shots and not (shots.isdecimal() and len(shots) < 4)):
            raise UserError(
                f"--suite: found {part!r} in {given!r}; expected {', '.join(SUITES)}, or tasks such as "
                "gsm8k,arc_challenge=25, where the number is that of the examples in each prompt"
            )
        if name in found:
            raise UserError(f"--suite: {name} stands twice in {given!r}; name each task once")
        found[name] = Asked(name, int(shots)) if has_shots else of_paper.get(name, Asked(name))
    names = "+".join(Path(name).stem if name.endswith(".yaml") else name for name in found)
    return Suite(names[:_LONGEST_NAME], tuple(found.values()))


def paper_columns(measured: Mapping[str, tuple[Mapping[str, float], int | None]]) -> dict[str, float]:
    """The numbers that the paper's tables show, by column, as far as they were measured with the paper's shots.

    Args:
        measured: metrics and shots by task. None: the shots are not known, or those of a group's tasks differ.
    """
    shots = {asked.task: asked.shots for suite in SUITES.values() for asked in suite.asked}
    found = {}
    for column in COLUMNS:
        metrics, of_task = measured.get(column.task, ({}, None))
        values = [metrics[metric] for metric in column.metrics if metric in metrics]
        if len(values) == len(column.metrics) and of_task == shots[column.task]:
            found[column.name] = sum(values) / len(values)
    return found
