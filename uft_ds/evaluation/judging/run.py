"""`uft judge`: ask for all judgements, and write them with their numbers unless too many are missing."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from uft_ds.evaluation.judging.record import Record
from uft_ds.evaluation.results import Evaluation, ItemResult, TaskResult, read_evaluation, write_evaluation
from uft_ds.scoring.item import NO_TOKENS, Judgement, Tokens
from uft_ds.scoring.pacing import Budget
from uft_ds.scoring.run import OnProgress, Progress

_EARLY_FAILURES = 20
"""From this many on, more failures than are tolerated end the run at once."""
_NUMBER = re.compile(r"\d[\d.,]*")

Unit = TypeVar("Unit")
Results = Callable[[Sequence[Unit], Sequence[Judgement]], tuple[TaskResult, list[ItemResult]]]


@dataclass(frozen=True)
class Work(Generic[Unit]):
    """What is to be judged, and how.

    units: each gets one judgement. name_of: what says which it is, as plain values.
    ask: judges some units. plan: of each question that they would be, its text, tokens, and whether a reply is kept.
    results: from all units and their judgements to the task's numbers.
    """

    units: Sequence[Unit]
    name_of: Callable[[Unit], Mapping[str, Any]]
    ask: Callable[[Sequence[Unit]], list[Judgement]]
    plan: Callable[[Sequence[Unit]], list[tuple[str, Tokens, bool]]]
    results: Results[Unit]
    batch: int = 32


@dataclass(frozen=True)
class About:
    """Whose answers are judged.

    name, model: the model, and what is known of it. settings: all else that its numbers depend on; models that are
    compared should have the same. identity: of the folder: of which answers it is, and who is asked.
    """

    name: str
    model: Mapping[str, Any]
    settings: Mapping[str, Any]
    identity: Mapping[str, Any]


@dataclass(frozen=True)
class Outcome:
    """How it ended. found: None where too many judgements are missing; then no results are written.

    reasons: of judgements that are missing, with their counts. remembered: tokens of replies from earlier runs.
    """

    found: Evaluation | None
    count: int
    reasons: Mapping[str, int]
    spent: Tokens
    remembered: Tokens = NO_TOKENS
    was_complete: bool = False

    @property
    def failed(self) -> int:
        return sum(self.reasons.values())


def judge_all(
    work: Work[Unit],
    about: About,
    folder: Path,
    budget: Budget,
    *,
    max_failures: float = 0.1,
    retry_failures: bool = False,
    on_progress: OnProgress = lambda progress: None,
) -> Outcome:
    """Judge all units and write the folder of an evaluation.

    Args:
        max_failures: the share of judgements that may be missing.
        retry_failures: ask again for what is missing, of a complete folder, too.
    Raises:
        UserError: the folder is of other settings, or no judgement can be made.
        CheckFailed: a limit is reached, or the judge is down.
    """
    record = Record(folder)
    with record.taken({**about.identity, **about.settings}):
        if record.is_complete and not retry_failures:
            reasons = _counted(record.missing())
            return Outcome(read_evaluation(folder), len(work.units), reasons, record.ledger.spent, was_complete=True)
        budget.begin(record.ledger.spent, record.ledger.add)
        judgements = _judged(work, record, max_failures, on_progress)
        record.unfinish()
        record.write_judgements([(work.name_of(unit), one) for unit, one in zip(work.units, judgements, strict=False)])
        reasons = _counted([one.reason for one in judgements if one.value is None])
        remembered = sum((one.remembered for one in judgements), NO_TOKENS)
        lost = Outcome(None, len(work.units), reasons, record.ledger.spent, remembered)
        is_hopeless = len(judgements) < len(work.units) or lost.failed > max_failures * len(work.units)
        if is_hopeless or lost.failed == len(work.units):
            return lost
        task, items = work.results(work.units, judgements)
        evaluation = Evaluation(about.name, about.model, about.settings, [task])
        write_evaluation(folder, evaluation, {task.task: items})
        return Outcome(evaluation, len(work.units), reasons, record.ledger.spent, remembered)


@dataclass(frozen=True)
class Rehearsal:
    """What would be asked. kept: answered by kept replies. tokens: of the others, at most. first: the first one."""

    questions: int
    kept: int
    tokens: Tokens
    first: str


def rehearse(work: Work[Unit], about: About, folder: Path) -> Rehearsal:
    """Check everything and count, without asking or writing anything."""
    Record(folder).check({**about.identity, **about.settings})
    planned = work.plan(work.units)
    tokens = sum((estimate for _, estimate, is_kept in planned if not is_kept), NO_TOKENS)
    return Rehearsal(len(planned), sum(is_kept for _, _, is_kept in planned), tokens, planned[0][0])


def _judged(work: Work[Unit], record: Record, max_failures: float, on_progress: OnProgress) -> list[Judgement]:
    """The judgements in the units' order; of the first ones alone where there is no use in going on."""
    start = time.monotonic()
    found: list[Judgement] = []
    total = len(work.units)
    while len(found) < total:
        found += work.ask(work.units[len(found) : len(found) + work.batch])
        failed = sum(one.value is None for one in found)
        on_progress(Progress(len(found), total, 0, failed, record.ledger.spent, time.monotonic() - start))
        if failed >= _EARLY_FAILURES and failed > max_failures * total:
            break
    return found


def _counted(reasons: Sequence[str]) -> dict[str, int]:
    """Reasons that differ in numbers alone are counted together, under the first of them."""
    first: dict[str, str] = {}
    counted = Counter(first.setdefault(_NUMBER.sub("0", reason), reason) for reason in reasons)
    return dict(counted.most_common())
