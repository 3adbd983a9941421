"""Score a data set: judgements first, each kept as it is made, and the output in the end."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uft_ds.errors import UserError
from uft_ds.host.files import write_atomically
from uft_ds.scoring.item import NO_TOKENS, Item, Scorer, Tokens, scorer_name
from uft_ds.scoring.mapping import Map, check_rule, map_named, rule_identity
from uft_ds.scoring.output import NotWritable, lines_of, output_rows
from uft_ds.scoring.record import FAILURES, QUARANTINE, Record, Scored
from uft_ds.scoring.rows import Counted, Row, Rows
from uft_ds.scoring.summary import Summary, summary_of

_EARLY_FAILURES = 20
"""From this many on, more failures than are tolerated end the run at once."""
_SECONDS_BETWEEN_SYNCS = 10.0
_NUMBER = re.compile(r"\d[\d.,]*")


@dataclass(frozen=True)
class Target:
    """What is to be written.

    rule: from raw values to scores, as `--map` gives it. split_pairs: write each side of a pair as a scored row.
    limit: the first rows only. max_failures: the share of answers that may have no score.
    """

    out: Path
    rule: str
    split_pairs: bool = False
    limit: int | None = None
    max_failures: float = 0.1

    def options(self, scorer: str) -> dict[str, Any]:
        """All of it that the output's bytes depend on. scorer: its name, for the file of an isotonic map."""
        return {"map": rule_identity(self.rule, scorer), "split_pairs": self.split_pairs, "limit": self.limit}


@dataclass(frozen=True)
class Progress:
    """done, total: answers, those of earlier runs included. begun: how many were done before this run."""

    done: int
    total: int
    begun: int
    failed: int
    spent: Tokens
    seconds: float


OnProgress = Callable[[Progress], None]
OnBegin = Callable[[Tokens, Callable[[Tokens], None]], None]


@dataclass(frozen=True)
class Outcome:
    """How it ended. is_written: whether the output is complete. was_complete: it had been before."""

    summary: Summary
    is_written: bool
    was_complete: bool = False


def score_data(
    rows: Rows,
    scorer: Scorer,
    target: Target,
    *,
    retry_failures: bool = False,
    on_begin: OnBegin = lambda spent, keep: None,
    on_progress: OnProgress = lambda progress: None,
) -> Outcome:
    """Score all answers of the rows, and write them with their scores.

    Args:
        retry_failures: score again what has failed, of a complete output, too.
        on_begin: called with the tokens that earlier runs have spent for this output, and what keeps those of this.
    Raises:
        UserError: bad rows, an output of another input or scorer, or a scorer that can score nothing.
        CheckFailed: the scorer may not go on; the same call does, later.
    """
    _check(rows, scorer, target)
    counted = rows.check(target.limit)
    record = Record(target.out)
    try:
        of_input = rows.identity()
        scored = record.open({"input": of_input, "scorer": dict(scorer.identity())})
        stored = record.summary()
        options = target.options(scorer_name(scorer.identity()))
        if stored is not None and stored["options"] == options and not retry_failures:
            summary = Summary.from_plain(stored)
            if summary.failed <= target.max_failures * summary.answers:  # it may have been another share then
                return Outcome(summary, is_written=True, was_complete=True)
        on_begin(record.spent, record.add_spent)
        _judge(rows, scorer, record, scored, _Counting(counted.answers, target, on_progress))
        if rows.identity() != of_input:  # it may have taken days
            raise UserError(f"{rows.label}: has changed while it was scored; {target.out} is not written")
        return _written(rows, scorer, record, scored, target)
    finally:
        record.close()


def _check(rows: Rows, scorer: Scorer, target: Target) -> None:
    if target.out.suffix != ".jsonl":
        raise UserError(f"--out {target.out}: expected a name that ends in .jsonl, as a recipe's source must")
    if rows.holds(target.out):
        raise UserError(f"--out {target.out}: lies in {rows.label}, whose files are the input; choose another folder")
    check_rule(target.rule, scorer_name(scorer.identity()))


class _Counting:
    """Counts what this run does, and says when there is no use in going on."""

    def __init__(self, total: int, target: Target, on_progress: OnProgress) -> None:
        self._total, self._on_progress = total, on_progress
        self._begun = self._done = self._failed = 0
        self._start = time.monotonic()
        self.target = target

    def is_there(self, scored: Scored) -> None:
        """Answers that an earlier run has scored."""
        self._begun += len(scored.values)
        self._done += len(scored.values)

    def is_new(self, scored: Scored) -> None:
        self._done += len(scored.values)
        self._failed += sum(value is None for value in scored.values)

    def tell(self, spent: Tokens) -> None:
        seconds = time.monotonic() - self._start
        self._on_progress(Progress(self._done, self._total, self._begun, self._failed, spent, seconds))

    @property
    def is_hopeless(self) -> bool:
        return self._failed >= _EARLY_FAILURES and self._failed > self.target.max_failures * self._total


def _judge(rows: Rows, scorer: Scorer, record: Record, scored: dict[int, Scored], counting: _Counting) -> None:
    """Add what is missing to `scored`. What failed in an earlier run is asked again."""
    synced = time.monotonic()
    for batch in _batches(rows, scorer, scored, counting):
        judgements = scorer.score([item for row in batch for item in row.items])
        for row in batch:
            own, judgements = judgements[: len(row.items)], judgements[len(row.items) :]
            scored[row.number] = record.add(row, own)
            counting.is_new(scored[row.number])
        record.flush()
        if time.monotonic() - synced > _SECONDS_BETWEEN_SYNCS:
            record.sync()
            synced = time.monotonic()
        counting.tell(record.spent)
        if counting.is_hopeless:
            break
    record.sync()


def _batches(rows: Rows, scorer: Scorer, scored: dict[int, Scored], counting: _Counting) -> Iterator[list[Row]]:
    """Rows that are to be scored, whole ones, about as many answers at once as the scorer likes."""
    batch: list[Row] = []
    size = 0
    for row in rows.rows(counting.target.limit):
        if row.left_out:
            continue
        found = scored.get(row.number)
        if found is not None and _is_done(row, found):
            counting.is_there(found)
            continue
        batch.append(row)
        size += len(row.items)
        if size >= scorer.batch_items:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _written(rows: Rows, scorer: Scorer, record: Record, scored: dict[int, Scored], target: Target) -> Outcome:
    """Map the raw values and write the output, unless too many answers have none."""
    name = scorer_name(scorer.identity())
    scoring = {"scorer": name, "map": target.rule}
    # An earlier run may have scored more.
    scored = {number: row for number, row in scored.items() if target.limit is None or number < target.limit}
    raw_R = [value for row in scored.values() for value in row.values if value is not None]
    options = target.options(name)
    to_score = map_named(target.rule, raw_R, name)
    tally = _Tally()
    # First without writing: how many rows have no score decides whether the output is written at all.
    for _ in _made(rows, scored, to_score, scoring, target, tally):
        pass
    record.write_lines(FAILURES, tally.failures)
    record.write_lines(QUARANTINE, tally.bad_rows)
    summary = summary_of(
        tally.scores, tally.raws, tally.reasons, tally.left_out, list(scored.values()), (name, record.spent)
    )
    if not tally.scores or summary.failed > target.max_failures * summary.answers:
        return Outcome(summary, is_written=False)
    record.unfinish()
    write_atomically(target.out, lines_of(_made(rows, scored, to_score, scoring, target, _Tally())))
    record.finish({**summary.plain(), "options": options})
    return Outcome(summary, is_written=True)


def _is_of(row: Row, judged: Scored | None) -> bool:
    """Whether a judgement is of this very content; another version of a format may read a row otherwise."""
    return judged is not None and judged.key == row.key


def _is_done(row: Row, judged: Scored) -> bool:
    """Whether nothing of a row is to be asked again."""
    return _is_of(row, judged) and not judged.has_failed


class _Tally:
    """What became of the answers."""

    def __init__(self) -> None:
        self.scores: list[float] = []
        self.raws: list[float] = []
        self.failures: list[dict[str, Any]] = []
        self.bad_rows: list[dict[str, Any]] = []
        self.reasons: Counter[str] = Counter()
        self.left_out: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    def fail(self, row: Row, reasons: tuple[str, ...], why: str) -> None:
        """A row without a score for every answer: none of them is used, as two sides of a pair belong together."""
        for item, reason in zip(row.items, reasons, strict=True):
            said = reason or why
            self.failures.append(_failure(item, said))
            # Reasons that differ in numbers alone are counted together, under the first of them.
            self.reasons[self._first.setdefault(_NUMBER.sub("0", said), said)] += 1


def _failure(item: Item, reason: str) -> dict[str, Any]:
    return {"place": item.place, "row": item.row, "reason": reason, "response": item.response}


def _made(
    rows: Rows,
    scored: dict[int, Scored],
    to_score: Map,
    scoring: dict[str, Any],
    target: Target,
    tally: _Tally,
) -> Iterator[dict[str, Any]]:
    for row in rows.rows(target.limit):
        if row.left_out:
            tally.left_out[row.left_out] += 1
            if row.fault:
                tally.bad_rows.append({"place": row.place, "row": row.number, "reason": row.fault})
            continue
        judged = scored.get(row.number)
        yield from _of_row(row, judged if _is_of(row, judged) else None, to_score, scoring, target, tally)


def _of_row(
    row: Row, judged: Scored | None, to_score: Map, scoring: dict[str, Any], target: Target, tally: _Tally
) -> list[dict[str, Any]]:
    """The output's rows of one row. Answers that do not belong together fail each by itself."""
    made: list[dict[str, Any]] = []
    whole = row.is_pair and not target.split_pairs
    for part in (row,) if whole else row.each():
        values = part.own((None,) * len(row.items) if judged is None else judged.values)
        reasons = part.own(("not scored",) * len(row.items) if judged is None else judged.reasons)
        try:
            raw = tuple(value for value in values if value is not None)
            if len(raw) < len(part.items):
                tally.fail(part, reasons, "the other answer of the pair has no score")
                continue
            scores = tuple(to_score(value) for value in raw)
            made += output_rows(part, raw, scores, scoring, split_pairs=target.split_pairs)
        except (ValueError, NotWritable) as error:
            tally.fail(part, ("",) * len(part.items), str(error))
            continue
        tally.scores += scores
        tally.raws += raw
    return made


@dataclass(frozen=True)
class Rehearsal:
    """What would be asked. done: answers that are scored. first: the first question to a judge, or empty."""

    counted: Counted
    done: int
    questions: int = 0
    kept: int = 0
    tokens: Tokens = NO_TOKENS
    first: str = ""


def rehearse(rows: Rows, scorer: Scorer, target: Target) -> Rehearsal:
    """Check everything and count, without scoring or writing anything."""
    _check(rows, scorer, target)
    counted = rows.check(target.limit)
    scored = Record(target.out).peek({"input": rows.identity(), "scorer": dict(scorer.identity())})
    done = questions = kept = 0
    tokens, first = Tokens(), ""
    plan = getattr(scorer, "plan", None)
    for row in rows.rows(target.limit):
        found = scored.get(row.number)
        if row.left_out:
            continue
        if found is not None and _is_done(row, found):
            done += len(row.items)
            continue
        for text, estimate, is_kept in plan(row.items) if plan is not None else ():
            questions += 1
            kept += is_kept
            tokens = tokens if is_kept else tokens + estimate
            first = first or text
    return Rehearsal(counted, done, questions, kept, tokens, first)


def check_pairwise(rows: Rows, limit: int | None) -> None:
    """Refuse data with rows of one answer alone: there is nothing to compare it with.

    Raises:
        UserError: says where.
    """
    counted = rows.check(limit)
    if counted.alone:
        raise UserError(
            f"--pairwise compares the answers of one row, and {counted.alone:,} rows hold one alone: "
            f"{', '.join(counted.alone_at)}; give pairs, or format ultrafeedback"
        )
