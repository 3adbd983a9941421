"""What `uft judge` shows. The judge's name stands beside every number: those of two judges are not comparable."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from uft_ds.evaluation.judging.record import JUDGEMENTS
from uft_ds.evaluation.judging.run import About, Outcome, Rehearsal
from uft_ds.evaluation.results import Evaluation
from uft_ds.host.terminal import visible
from uft_ds.scoring.item import Tokens

Cost = Callable[[Tokens], float]

_LETTERS_SHOWN = 2000
_REASONS_SHOWN = 5
_SHARES = ("win_rate", "length_controlled_win_rate", "contradictions", "failed")
_OF_NO_JUDGE = "average_characters"


def table_of(found: Evaluation) -> Table:
    """The numbers of a judgement, each with its judge."""
    table = Table(box=None, pad_edge=False)
    for name, justify in (
        ("model", "left"),
        ("task", "left"),
        ("metric", "left"),
        ("value", "right"),
        ("judge", "left"),
    ):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for task in found.tasks:
        for metric, value in task.metrics.items():
            kind = metric.partition(",")[0]
            shown = f"{value:.1%}" if kind in _SHARES else f"{value:,.0f}" if kind == _OF_NO_JUDGE else f"{value:.2f}"
            judge = "" if kind == _OF_NO_JUDGE else task.judge or ""
            table.add_row(*map(visible, (found.name, task.task, metric, shown, judge)))
    return table


def in_words(found: Rehearsal, about: About, cost: Cost | None) -> list[str]:
    """What a dry run has found."""
    asked = found.questions - found.kept
    spending = f", at most about {cost(found.tokens):.4f}" if cost is not None else ""
    return [
        visible(f"answers of {about.name}; {prompts_in_words(about.settings)}"),
        f"{found.questions:,} questions to the judge, {found.kept:,} of them answered by kept replies; the other "
        f"{asked:,} take at most about {found.tokens.total:,} tokens ({found.tokens.prompt:,} of prompts, "
        f"{found.tokens.completion:,} of replies){spending}",
        "the first question:",
        visible(found.first[:_LETTERS_SHOWN]),
        "dry run: nothing was asked and nothing is written",
    ]


def prompts_in_words(settings: Mapping[str, Any]) -> str:
    """Which prompts ask the judge, and whether with references."""
    said = f"judged by {settings['judge']['model']}, asked by {settings['prompts']}"
    if "references" in settings:
        said += ", with references" if settings["references"] else ", without references"
    return said


def how_it_ended(outcome: Outcome, out: Path, max_failures: float, cost: Cost | None) -> list[str]:
    """The last lines: how it was asked, what is missing and what it took."""
    lines = []
    found = outcome.found
    if found is not None:
        lines.append(visible(prompts_in_words(found.settings)))
    if outcome.failed:
        units = "judgements are missing, and in no mean"
        lines.append(f"{outcome.failed:,} of {outcome.count:,} {units}; see {out / JUDGEMENTS}:")
        shown = list(outcome.reasons.items())
        lines += [visible(f"  {count:,}: {reason}") for reason, count in shown[:_REASONS_SHOWN]]
        if len(shown) > _REASONS_SHOWN:
            lines.append(f"  {len(shown) - _REASONS_SHOWN:,} other reasons")
    if outcome.spent.total or outcome.remembered.total:
        spending = f"; cost {cost(outcome.spent):.4f}" if cost is not None else ""
        lines.append(
            f"tokens: {outcome.spent.prompt:,} of prompts, {outcome.spent.completion:,} of replies; "
            f"{outcome.remembered.total:,} not asked again, of kept replies{spending}"
        )
    if found is None:
        lines.append(
            f"not written: {out}: {outcome.failed / outcome.count:.1%} of the judgements are missing, at most "
            f"{max_failures:.1%} may (--max-failures). The same command asks again for them"
        )
    elif outcome.was_complete:
        lines.append(f"complete before: {out}; nothing to do")
    else:
        lines.append(f"done: {out}")
    return lines
