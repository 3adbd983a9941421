"""Build a store of tokenised sequences from rows, in several processes, one chunk of rows at a time.

The store does not depend on the number of processes, because results are written in the order of the rows.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing
from dataclasses import MISSING, dataclass, field, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from uft_ds.data.example import Example, Kind, Pair, Unit
from uft_ds.data.formats.columns import check_renaming, unread_columns
from uft_ds.data.formats.fields import LeftOut, OfThisFormat
from uft_ds.data.formats.guess import other_formats
from uft_ds.data.formats.items import described, items_of
from uft_ds.data.formats.scales import Scale, check_score_range, given_scores
from uft_ds.data.formats.table import Format, format_named
from uft_ds.data.rows.places import place_of
from uft_ds.data.rows.reading import RawRow, SourceFiles, data_size, parse_row, raw_rows
from uft_ds.data.rows.renaming import renamed
from uft_ds.data.store.account import Account, ScoresGiven
from uft_ds.data.store.refusal import PLACES_NAMED, BadRows
from uft_ds.data.store.store_files import Place
from uft_ds.data.store.writing import StoreWriter, pack_units
from uft_ds.data.tokens.chat_tokenizer import ChatTokenizer
from uft_ds.data.tokens.tokenize import tokenize
from uft_ds.errors import UserError
from uft_ds.host.process import die_with_parent, helpers_without_usr1

QUARANTINE = "quarantine.jsonl"
_UNREAD_NAMED = 50
"""How many names of columns that are not read are kept."""

_READ_ON_ROWS = 50_000
"""How many rows are read after the first bad one, to say how many are bad."""

_CHUNK_ROWS, _CHUNK_BYTES = 256, 2**20
_PARALLEL_FROM_BYTES = 16 * 2**20
"""A smaller source is tokenised in this process, because starting others takes seconds."""


@dataclass(frozen=True)
class RowRules:
    """How a row becomes units; every field is part of the store's key.

    where: take only rows whose columns have these values; the names are those of the data.
    columns: (the format's name, the name in the data) of a column, or (name, None) of one that is left out.
    split_pairs: turn each pair into two scored responses (UNA).
    score_range: the scale of the scores in the rows; None: that of the format.
    mixed_kinds: whether the rows of a file may be of several kinds.
    """

    format: str
    score: float | None
    max_length: int
    merge: bool
    trim_prompt: bool
    split_pairs: bool = False
    where: tuple[tuple[str, Any], ...] = ()
    columns: tuple[tuple[str, str | None], ...] = ()
    score_range: Scale | None = None
    mixed_kinds: bool = False


def with_later_rules(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Rules as a store's JSON holds them, with the defaults of those that the version that wrote it did not have."""
    defaults = {rule.name: rule.default for rule in fields(RowRules) if rule.default is not MISSING}
    return {**json.loads(json.dumps(defaults)), **stored}


@dataclass(frozen=True)
class RowShape:
    """What the first row of a file gave; the other rows must be of the same kind, unless the source mixes kinds.

    gives: the kind of its items; pairs with scores and pairs without are two kinds.
    """

    line: int
    gives: str
    keys: tuple[str, ...]


@dataclass(frozen=True)
class _Chunk:
    rows: tuple[RawRow, ...]
    place: str
    """The file's name."""
    shape: RowShape | None


@dataclass
class _Result:
    """The units of one chunk of rows, and its drop statistics."""

    columns: dict[str, np.ndarray] = field(default_factory=dict)
    shape: RowShape | None = None
    num_rows: int = 0
    num_skipped: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)
    places: list[tuple[str, int, int]] = field(default_factory=list)
    bad: list[tuple[RawRow, str]] = field(default_factory=list)
    of_this_format: int = 0
    """The number of bad rows that are of the format, and whose messages say what to do."""
    keys: set[str] = field(default_factory=set)
    """The columns of all readable rows; collected only for a source with a `where` or `columns`."""
    unread: Counter[str] = field(default_factory=Counter)
    """The number of rows by the name of each column that holds something and is not read."""
    scores: ScoresGiven | None = None


def build_store(
    folder: Path,
    data: SourceFiles,
    rules: RowRules,
    chat: ChatTokenizer,
    *,
    quarantine: bool,
    workers: int | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Read, check and tokenise all rows of a source into an empty folder.

    Args:
        quarantine: write bad rows to quarantine.jsonl instead of refusing the source.
        workers: number of processes; None: one per core, or this process alone for a small source.
    Raises:
        UserError: names the file and line, what was found and what was expected, and how many rows are bad.
    """
    total = Account(0, {}, {}, {}, 0, 0)
    make = format_named(rules.format)
    check_renaming(rules.columns, make, data.label)
    check_score_range(rules.score_range, make, rules.format, data.label)
    refused = BadRows(data.label, rules.format)
    columns: set[str] = set()
    writer = StoreWriter(folder)
    with ExitStack() as stack:
        stack.callback(writer.close)
        rejected = stack.enter_context((folder / QUARANTINE).open("w", encoding="utf-8"))
        results = stack.enter_context(closing(_results(data, rules, chat, workers, on_progress)))
        for result in _reading_on(results, refused):
            total = _added(total, result)
            if not quarantine:
                refused.of_this_format += result.of_this_format
                for row, reason in result.bad:
                    refused.add(data.place(row.file, row.line), reason)
            if refused.count:
                continue  # only to count: nothing of this source is used
            rejected.writelines(_quarantined(data, row, reason) for row, reason in result.bad)
            writer.add(result.columns)
            columns |= result.keys
        if refused.count:
            raise refused.error(total)
        _check_columns(data, rules, columns)
        writer.finish(data.names, total)


def _reading_on(results: Iterator[_Result], bad: BadRows) -> Iterator[_Result]:
    """The results up to the end; after a bad row, up to about _READ_ON_ROWS rows more, or to where a file is broken."""
    after = 0
    try:
        for result in results:
            yield result
            after += result.num_rows if bad.count else 0
            if after >= _READ_ON_ROWS:
                bad.ended_by = "the rows after them have not been read"
                return
    except UserError as error:
        if not bad.count:
            raise
        bad.ended_by = str(error)


def examine_row(
    row: dict[str, Any], rules: RowRules, make: Format, chat: ChatTokenizer, *, file: int, line: int
) -> tuple[str | None, list[tuple[Unit, Place]], Counter[str], Counter[str]]:
    """The units of one row.

    Returns:
        the kind of the row's items (None if it has none), the units with their places, then the number of responses
        dropped and changed, by reason.
    Raises:
        ValueError: a bad row.
    """
    dropped: Counter[str] = Counter()
    changed: Counter[str] = Counter()
    try:
        items = items_of(row, make, format=rules.format, score=rules.score, score_range=rules.score_range)
    except LeftOut as left_out:
        dropped[left_out.reason] += left_out.num_responses
        return None, [], dropped, changed
    kind = described(items[0]) if items else None
    if rules.split_pairs:
        items = [side for item in items for side in _sides(item)]
    units: list[tuple[Unit, Place]] = []
    for number, item in enumerate(items, start=1):
        if isinstance(item, Pair) and item.is_tie:
            dropped["tie"] += 2
            continue
        tokenized = tokenize(item, chat, max_length=rules.max_length, merge=rules.merge, trim_prompt=rules.trim_prompt)
        dropped.update(tokenized.dropped)
        changed.update(tokenized.changed)
        place = Place(file, line, number if len(items) > 1 else 0)
        units += [(unit, place) for unit in tokenized.units]
    return kind, units, dropped, changed


def _results(
    data: SourceFiles,
    rules: RowRules,
    chat: ChatTokenizer,
    workers: int | None,
    on_progress: Callable[[int, int], None],
) -> Generator[_Result, None, None]:
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if data_size(data) >= _PARALLEL_FROM_BYTES else 1
    examine = _Examiner(rules, chat)
    with closing(raw_rows(data, on_progress)) as rows:
        chunks = _chunks(rows, data)
        if workers == 1:
            yield from _in_order(chunks, examine, None, 0)
        else:
            yield from _by_processes(chunks, examine, workers, data.label)


def _by_processes(chunks: Iterator[_Chunk], examine: _Examiner, workers: int, label: str) -> Iterator[_Result]:
    # Spawn, not fork: this process has threads (of torch, tokenizers and the rank), and a fork would copy their locks.
    context = multiprocessing.get_context("spawn")
    with (
        helpers_without_usr1(),
        ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(examine,)) as pool,
    ):
        try:
            yield from _in_order(chunks, examine, pool, 4 * workers)
        except BrokenProcessPool:
            raise UserError(
                f"{label}: a process that tokenised it was killed; out of memory? Set data.workers lower"
            ) from None
        finally:
            # A bad row ends the source at once: chunks that wait are not worth tokenising.
            pool.shutdown(wait=False, cancel_futures=True)


def _in_order(
    chunks: Iterator[_Chunk], examine: _Examiner, pool: ProcessPoolExecutor | None, waiting: int
) -> Iterator[_Result]:
    """The results of the chunks, in order.

    The chunks at a file's beginning are examined in this process, because their first row sets the shape of all others.
    At most `waiting` chunks are submitted ahead, so memory stays bounded.
    """
    shapes: dict[int, RowShape] = {}
    pending: deque[Future[_Result]] = deque()
    for chunk in chunks:
        file = chunk.rows[0].file
        if pool is not None and file in shapes:
            pending.append(pool.submit(_work, replace(chunk, shape=shapes[file])))
        else:
            while pending:  # results of the file before come first
                yield pending.popleft().result()
            result = examine(replace(chunk, shape=shapes.get(file)))
            if result.shape is not None:
                shapes[file] = result.shape
            yield result
        while len(pending) > waiting:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _chunks(rows: Iterator[RawRow], data: SourceFiles) -> Iterator[_Chunk]:
    held: list[RawRow] = []
    size = 0
    for row in rows:
        # A chunk never crosses files, because each file has its own row shape.
        if held and (row.file != held[0].file or len(held) == _CHUNK_ROWS or size >= _CHUNK_BYTES):
            yield _Chunk(tuple(held), data.names[held[0].file], None)
            held, size = [], 0
        held.append(row)
        # Rows of tables have no text yet: they count as an equal part of a chunk, so only the number of rows limits it.
        size += len(row.value) if isinstance(row.value, bytes) else _CHUNK_BYTES // _CHUNK_ROWS
    if held:
        yield _Chunk(tuple(held), data.names[held[0].file], None)


class _Examiner:
    """Examines chunks of rows. It is sent to each worker process once."""

    def __init__(self, rules: RowRules, chat: ChatTokenizer) -> None:
        self._rules, self._chat = rules, chat

    def __call__(self, chunk: _Chunk) -> _Result:
        make = format_named(self._rules.format)
        result = _Result(shape=chunk.shape)
        units: list[tuple[Unit, Place]] = []
        for raw in chunk.rows:
            result.num_rows += 1
            keys: tuple[str, ...] = ()
            row: dict[str, Any] = {}
            outside = 0
            try:
                row = parse_row(raw.value)
                keys = tuple(key for key, value in row.items() if value is not None)
                if self._rules.where or self._rules.columns:
                    result.keys.update(row)
                if any(row.get(column) != value for column, value in self._rules.where):
                    result.num_skipped += 1
                    continue
                row = renamed(row, self._rules.columns)
                scores, outside = given_scores(row, make, self._rules.score_range)
                result.scores = ScoresGiven.of(scores, outside).joined(result.scores) if scores else result.scores
                given, found, dropped, changed = examine_row(
                    row, self._rules, make, self._chat, file=raw.file, line=raw.line
                )
                if given is not None:
                    # Only a row that gave items sets the shape: a row that was left out says nothing about its kind.
                    result.shape = result.shape or RowShape(raw.line, given, keys)
                    if not self._rules.mixed_kinds:
                        _check_shape(given, keys, result.shape, chunk.place)
            except _OtherKind as error:
                result.bad.append((raw, str(error)))
                continue
            except ValueError as error:
                # A good row before, names given by hand, or another scale: then the format is not what is wrong.
                asks = result.shape is None and not self._rules.columns and not outside
                instead = other_formats(row, self._rules.format) if asks else ""
                if instead:
                    first, _, _ = str(error).partition("; ")  # what follows is advice for rows of the given format
                    result.bad.append((raw, f"{instead} (read as {self._rules.format}: {first})"))
                    continue
                result.of_this_format += isinstance(error, OfThisFormat)
                shape = None if self._rules.mixed_kinds else result.shape
                hints = _lacking(keys, self._rules) + _other_keys(keys, shape, chunk.place)
                result.bad.append((raw, f"{error}{hints}"))
                continue
            units += found
            result.unread.update(unread_columns(row, make, has_feedback=given != "instruction"))
            result.dropped.update(dropped)
            result.changed.update(changed)
            result.places += [(reason, raw.file, raw.line) for reason in (*dropped, *changed)]
        result.columns = pack_units(units)
        return result


class _OtherKind(ValueError):
    """A row of another kind than the first row of its file."""


def _check_shape(given: str, keys: tuple[str, ...], first: RowShape, file: str) -> None:
    if given != first.gives:
        raise _OtherKind(
            f"a row of kind {given!r} with keys {', '.join(keys)}; {place_of(file, first.line)} is of kind "
            f"{first.gives!r} with keys {', '.join(first.keys)}: the rows of a file must be of one kind; put the "
            "others into another file, or set this source's mixed_kinds: true if that is meant"
        )


def _lacking(keys: tuple[str, ...], rules: RowRules) -> str:
    lacking = [given for _, given in rules.columns if given is not None and given not in keys]
    return f" [`columns` asks for {', '.join(lacking)}, which this row does not have]" if lacking and keys else ""


def _other_keys(keys: tuple[str, ...], first: RowShape | None, file: str) -> str:
    if first is None or not keys or set(keys) == set(first.keys):
        return ""
    return f" [keys here: {', '.join(sorted(keys))}; at {place_of(file, first.line)}: {', '.join(sorted(first.keys))}]"


def _check_columns(data: SourceFiles, rules: RowRules, columns: set[str]) -> None:
    named = [("where", column) for column, value in rules.where if value is not None]
    named += [("columns", given) for _, given in rules.columns if given is not None]
    for key, column in named:
        if column not in columns:
            raise UserError(
                f"{data.label}: `{key}` asks for {column!r}, which no row has; columns: {', '.join(sorted(columns))}"
            )


def _sides(item: Example | Pair) -> tuple[Example, ...]:
    """A pair as two responses with a score each (UNA, arXiv 2408.15339 Eq. 11 and 13)."""
    if isinstance(item, Example):
        return (item,)
    kind: Kind = "score" if item.scored else "binary"
    return (replace(item.chosen, kind=kind), replace(item.rejected, kind=kind))


def _added(total: Account, result: _Result) -> Account:
    places = dict(total.places)
    for reason, file, line in result.places:
        if len(places.get(reason, ())) < PLACES_NAMED:
            places[reason] = (*places.get(reason, ()), (file, line))
    return Account(
        total.rows + result.num_rows,
        dict(Counter(total.dropped) + result.dropped),
        dict(Counter(total.changed) + result.changed),
        places,
        total.quarantined + len(result.bad),
        total.skipped + result.num_skipped,
        # Data may have a new name in every row: the first names are enough.
        {
            column: total.unread.get(column, 0) + result.unread[column]
            for column in islice({**total.unread, **result.unread}, _UNREAD_NAMED)
        },
        total.scores if result.scores is None else result.scores.joined(total.scores),
    )


def _quarantined(data: SourceFiles, row: RawRow, reason: str) -> str:
    """A line of quarantine.jsonl: where the row is, why it was left out, and the row itself."""
    raw = row.value if isinstance(row.value, bytes) else repr(row.value).encode("utf-8", "backslashreplace")
    entry = {
        "place": data.place(row.file, row.line),
        "byte": row.byte,
        "reason": reason,
        "sha256": hashlib.sha256(raw).hexdigest(),
        "row": raw.decode("utf-8", "backslashreplace"),
    }
    return json.dumps(entry) + "\n"


# The examiner of a worker process, set when the process starts.
_examiner: list[Callable[[_Chunk], _Result]] = []


def _start_worker(examine: Callable[[_Chunk], _Result]) -> None:
    die_with_parent()
    # The work is already divided over processes; threads of the tokenizers would compete with them.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _examiner.append(examine)


def _work(chunk: _Chunk) -> _Result:
    return _examiner[0](chunk)
