"""What `uft score` shows: a line of progress, what a dry run found, and the table at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress as Bar
from rich.progress import TextColumn
from rich.table import Table

from uft_ds.host.terminal import duration, visible
from uft_ds.scoring.item import Tokens
from uft_ds.scoring.record import FAILURES
from uft_ds.scoring.run import OnProgress, Outcome, Progress, Rehearsal, Target
from uft_ds.scoring.summary import QUANTILES, Summary

Cost = Callable[[Tokens], float]

_SECONDS_BETWEEN_LINES = 30.0
_REASONS_SHOWN = 5
_LETTERS_SHOWN = 2000


@contextmanager
def shown_progress(console: Console, cost: Cost | None) -> Iterator[OnProgress]:
    """A line that is renewed on a terminal; elsewhere a line every half a minute."""
    if console.is_terminal:
        with Bar(TextColumn("{task.description}"), console=console, transient=True) as bar:
            task = bar.add_task("reading")
            yield lambda progress: bar.update(task, description=progress_line(progress, cost))
        return
    last = time.monotonic()

    def line(progress: Progress) -> None:
        nonlocal last
        if time.monotonic() - last >= _SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            console.print(progress_line(progress, cost))

    yield line


def progress_line(progress: Progress, cost: Cost | None = None) -> str:
    """`scored 1,200 of 20,000  41/s  7 min 38 s left  3 failed  120,400 tokens  0.31`."""
    here = progress.done - progress.begun
    parts = [f"scored {progress.done:,} of {progress.total:,}"]
    if here and progress.seconds > 0:
        rate = here / progress.seconds
        parts += [
            f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.2g}/s",
            f"{duration((progress.total - progress.done) / rate)} left",
        ]
    parts.append(f"{progress.failed:,} failed")
    if progress.spent.total:
        parts.append(f"{progress.spent.total:,} tokens")
        if cost is not None:
            parts.append(f"cost {cost(progress.spent):.4f}")
    return "  ".join(parts)


def in_words(found: Rehearsal, *, is_judge: bool, cost: Cost | None) -> list[str]:
    """What a dry run has found."""
    counted = found.counted
    lines = [
        f"{counted.rows:,} rows, {counted.answers:,} answers to score; {found.done:,} of them are scored already"
        + (f"; {counted.left_out:,} rows are left out" if counted.left_out else "")
    ]
    if is_judge:
        asked = found.questions - found.kept
        spending = f", at most about {cost(found.tokens):.4f}" if cost is not None else ""
        lines.append(
            f"{found.questions:,} questions to the judge, {found.kept:,} of them answered by kept replies; the other "
            f"{asked:,} take at most about {found.tokens.total:,} tokens ({found.tokens.prompt:,} of prompts, "
            f"{found.tokens.completion:,} of replies){spending}"
        )
        if found.first:
            lines += ["the first question:", visible(found.first[:_LETTERS_SHOWN])]
    lines.append("dry run: nothing was asked and nothing is written")
    return lines


def table_of(summary: Summary, cost: Cost | None) -> Table:
    """The numbers of a scored data set."""
    table = Table(box=None, pad_edge=False, show_header=False)
    rows = [("scorer", summary.scorer), ("answers", f"{summary.answers:,}"), ("with a score", f"{summary.scored:,}")]
    share = summary.failed / summary.answers if summary.answers else 0.0
    rows.append(("without", f"{summary.failed:,} ({share:.1%})"))
    shown = list(summary.reasons.items())
    rows += [("", f"{count:,}: {reason}") for reason, count in shown[:_REASONS_SHOWN]]
    if len(shown) > _REASONS_SHOWN:
        rows.append(("", f"{len(shown) - _REASONS_SHOWN:,} other reasons"))
    rows += [("rows left out", f"{count:,}: {reason}") for reason, count in summary.left_out.items()]
    rows += [(f"{note}s", f"{count:,}") for note, count in summary.notes.items()]
    if summary.mean is not None and summary.raw_mean is not None:
        names = "  ".join(f"{quantile:.0%}" for quantile in QUANTILES)
        rows += [
            ("score: mean", f"{summary.mean:.4g}"),
            (f"score at {names}", "  ".join(f"{value:.4g}" for value in summary.quantiles)),
        ]
        if summary.raw_quantiles != summary.quantiles:
            rows += [
                ("raw: mean", f"{summary.raw_mean:.4g}"),
                (f"raw at {names}", "  ".join(f"{value:.4g}" for value in summary.raw_quantiles)),
            ]
    if summary.spent.total or summary.remembered.total:
        spent = f"{summary.spent.prompt:,} of prompts, {summary.spent.completion:,} of replies"
        rows.append(("tokens", f"{spent}; {summary.remembered.total:,} not asked again, of kept replies"))
        if cost is not None:
            rows.append(("cost", f"{cost(summary.spent):.4f}"))
    for name, value in rows:
        table.add_row(name, visible(value))
    return table


def how_it_ended(outcome: Outcome, target: Target) -> str:
    """The last line."""
    if outcome.was_complete:
        return f"complete before: {target.out}; nothing to do"
    failures = f"{target.out}.scoring/{FAILURES}"
    summary = outcome.summary
    if outcome.is_written:
        lost = f"; {summary.failed:,} answers without a score are left out: {failures}" if summary.failed else ""
        return f"done: {target.out}{lost}"
    share = summary.failed / summary.answers if summary.answers else 0.0
    why = f"{share:.1%} of the answers have no score, at most {target.max_failures:.1%} may (--max-failures)"
    if not summary.answers:
        why = "there is no answer to score"
    return f"not written: {target.out}: {why}; see {failures}. The same command asks again for those that failed"
