"""Prepare a recipe's sources: find, tokenise and check them, and select what a run uses.

The rows are read by `rows/`, tokenised by `store/` and mixed by `mixture`; drop statistics are checked here.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np

from uft_ds.data.example import GOOD_FROM, KINDS
from uft_ds.data.mixture import ONE_PASS, Portion, amounts_of
from uft_ds.data.rows.reading import SourceFiles, find_data
from uft_ds.data.score_map import ScoreMap, affine, quantiles
from uft_ds.data.store.account import Account
from uft_ds.data.store.building import RowRules
from uft_ds.data.store.refusal import PLACES_NAMED, range_hint
from uft_ds.data.store.selection import Selection
from uft_ds.data.store.token_store import TokenStore
from uft_ds.data.store.tokenized import ensure_store, open_store, quarantine_file, read_key_parts
from uft_ds.data.tokens.chat_tokenizer import ChatTokenizer
from uft_ds.data.tokens.tokenize import LONG
from uft_ds.errors import UserError

_ONE_SCORE_FROM = 20
"""Number of responses from which one score for all is refused; fewer may have the same score by chance."""


ScoreMapping = Literal["quantile"] | tuple[float, float] | None
"""The map of a source's scores: to their quantiles, or by (scale, offset); None leaves them unchanged."""


@dataclass(frozen=True)
class AskedSettings:
    """How the prompts of an online source are answered.

    answers: how often each is asked. answer_tokens: of the longest answer, the end-of-turn token included.
    """

    answers: int
    answer_tokens: int


@dataclass(frozen=True)
class SourceSettings:
    """What to read from one source, and how: the recipe's entry as plain values.

    The stages of a source are SourceSettings, SourceFiles (found), TokenStore (tokenised) and PreparedSource.

    asked: of an online source, whose rows are prompts; None: the rows hold responses.
    recipe_key: of the recipe's entry, such as data.sources.0, for messages alone; empty for a source of no recipe.
    """

    path: str
    split: str | None
    rules: RowRules
    examples: int | None = None
    portion: Portion = ONE_PASS
    allow_one_score: bool = False
    score_map: ScoreMapping = None
    asked: AskedSettings | None = None
    recipe_key: str = field(default="", compare=False)

    @property
    def path_key(self) -> str:
        """The recipe's key of the path; empty for a source of no recipe."""
        return self.recipe_key and f"{self.recipe_key}.path"

    @property
    def label(self) -> str:
        return self.path + (f"[{self.split}]" if self.split else "")

    @property
    def seed_name(self) -> str:
        """The name from which, with the seed, the order is drawn: the label without folders, so that data may move."""
        return Path(self.label).name


@dataclass(frozen=True)
class Tolerance:
    """Which faults of a source are accepted.

    quarantine: leave bad rows out instead of refusing the source. max_quarantined: largest share of bad rows.
    long_responses: whether responses longer than max_length may be dropped.
    """

    quarantine: bool = False
    max_quarantined: float = 0.01
    long_responses: bool = True


@dataclass(frozen=True)
class PreparedSource:
    """The part of one source that a run uses.

    key: the content hash that names its token store.
    """

    settings: SourceSettings
    key: str
    selection: Selection

    @property
    def label(self) -> str:
        return self.settings.label

    @property
    def names(self) -> tuple[str, ...]:
        return self.selection.store.names

    @property
    def account(self) -> Account:
        return self.selection.store.account

    @property
    def quarantine_file(self) -> Path:
        """The file of its bad rows, one JSON object per line."""
        return quarantine_file(self.selection.store)

    @property
    def first_bad_rows(self) -> list[tuple[str, str]]:
        """(place, reason) of up to three quarantined rows. The files have the names of when they were tokenised."""
        with self.quarantine_file.open(encoding="utf-8") as lines:
            rows = [json.loads(line) for line in islice(lines, PLACES_NAMED)]
        return [(row["place"], row["reason"]) for row in rows]

    @property
    def seed_name(self) -> str:
        return self.settings.seed_name

    @property
    def portion(self) -> Portion:
        return self.settings.portion

    @property
    def num_responses(self) -> int:
        """How many responses one pass over the source gives: of an online one, each prompt's answers."""
        asked = self.settings.asked
        return self.selection.num_responses * (1 if asked is None else asked.answers)


@dataclass(frozen=True)
class PreparedData:
    """All data that a run uses."""

    train: tuple[PreparedSource, ...]
    held_out: tuple[PreparedSource, ...]

    @property
    def all(self) -> tuple[PreparedSource, ...]:
        return (*self.train, *self.held_out)

    @cached_property
    def epoch_amounts(self) -> list[float]:
        """About how many responses one epoch of the mixture takes from each training source.

        Raises:
            ValueError: the shares leave nothing for the other sources, or do not add up to 1.
        """
        return amounts_of([source.num_responses for source in self.train], [source.portion for source in self.train])


def prepare_source(
    source: SourceSettings,
    chat: ChatTokenizer,
    cache_dir: Path,
    *,
    seed: int,
    tolerance: Tolerance,
    workers: int | None = None,
    files: SourceFiles | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> PreparedSource:
    """Tokenise one source, or reuse its store; check it and draw the requested examples.

    Args:
        files: as `find_data` has found them; None: they are looked for here.
    Raises:
        UserError: data that is not there or cannot be read (the recipe's key and the path), a bad row (file:line), no
            usable response, or fewer responses than requested.
    """
    data = find_data(source.path, source.split, source.path_key) if files is None else files
    key = ensure_store(
        data,
        source.rules,
        chat,
        cache_dir,
        quarantine=tolerance.quarantine,
        workers=workers,
        on_progress=on_progress,
    )
    prepared = open_source(source, cache_dir, key, data.names, seed=seed)
    _check_account(prepared, tolerance)
    _check_found(prepared)
    _check_scores(prepared)
    return prepared


def open_source(
    source: SourceSettings, cache_dir: Path, key: str, names: tuple[str, ...], *, seed: int
) -> PreparedSource:
    """The source that `prepare_source` prepared, opened by its key."""
    store = open_store(cache_dir, key, source.label, names)
    selection = select(store, source.examples, source.seed_name, seed=seed)
    return PreparedSource(source, key, replace(selection, score_map=_score_map(source, selection)))


def _score_map(source: SourceSettings, selection: Selection) -> ScoreMap | None:
    if source.score_map is None or not len(selection):
        return None
    if source.score_map == "quantile" and "instruction" in selection.kinds:
        raise UserError(f"{source.label}: score_map: quantile, but instruction data has one score: all would be 0.5")
    try:
        found = quantiles(selection.scores_R) if source.score_map == "quantile" else None
        found = found or affine(selection.scores_R, *source.score_map)
    except ValueError as error:
        raise UserError(f"{source.label}: score_map {error}") from None
    labels = np.unique(selection.scores_of("binary"))
    if any((label < GOOD_FROM) != (found(label) < GOOD_FROM) for label in labels):
        raise UserError(f"{source.label}: score_map must leave bad labels below {GOOD_FROM}, and no others")
    return found


def select(store: TokenStore, examples: int | None, name: str, *, seed: int) -> Selection:
    """All units of a store, or the units of random rows that together hold `examples` responses.

    The order of the rows is drawn from (seed, name). The selection for a smaller number is the beginning of the
    selection for a larger one, and it does not depend on whether conversations are merged.
    """
    if examples is None:
        return Selection(store, np.arange(len(store)))
    # Rows are shuffled, not units: a merged conversation is one unit, an unfolded one is several units of one row.
    rows_U = store.rows_U
    shuffled = np.random.default_rng([seed, zlib.crc32(name.encode())]).permutation(
        rows_U[-1] + 1 if len(rows_U) else 0
    )
    drawn_U = np.argsort(shuffled[rows_U], kind="stable")
    sums = store.responses_U[drawn_U].cumsum()
    count = int(np.searchsorted(sums, examples)) + 1
    if count > len(drawn_U):
        return Selection(store, drawn_U)
    # The last conversation is cut after the response that completes the number; a pair is never cut.
    before = int(sums[count - 2]) if count > 1 else 0
    last = None if store.is_pair(int(drawn_U[count - 1])) else examples - before
    return Selection(store, drawn_U[:count], last)


def _check_account(prepared: PreparedSource, tolerance: Tolerance) -> None:
    account = prepared.account
    if account.quarantined and not tolerance.quarantine:
        (place, reason), *_ = prepared.first_bad_rows
        raise UserError(
            f"{place}: {reason} ({account.quarantined:,} of {account.rows:,} rows of {prepared.label} are bad, all in "
            f"{prepared.quarantine_file}); correct them, or set data.on_bad_row: quarantine to leave them out"
        )
    if account.quarantined > tolerance.max_quarantined * account.rows:
        named = [f"  {place}: {reason}" for place, reason in prepared.first_bad_rows]
        hint = range_hint(prepared.label, account.scores)
        summary = (
            f"{prepared.label}: {account.quarantined} of {account.rows} rows are bad, more than data.max_quarantined "
            f"{tolerance.max_quarantined:g} allows; each is named with its reason in {prepared.quarantine_file}; "
            "the first:"
        )
        raise UserError("\n".join([summary, *named, *([hint] if hint else [])]))
    if account.dropped.get(LONG) and not tolerance.long_responses:
        first, *_ = prepared.selection.store.places_of(LONG)
        raise UserError(
            f"{first}: a response ends past data.max_length {prepared.settings.rules.max_length} "
            f"({account.dropped[LONG]} do in {prepared.label}); raise it, or set data.too_long: drop or trim_prompt"
        )


def _check_found(prepared: PreparedSource) -> None:
    source, account, store = prepared.settings, prepared.account, prepared.selection.store
    reasons = "; ".join(
        f"{count} {reason} (first: {', '.join(store.places_of(reason))})" for reason, count in account.dropped.items()
    )
    where = f"; {account.skipped} rows that `where` does not select" if account.skipped else ""
    left_out = f"; left out: {reasons}" if reasons else ""
    found = prepared.selection.num_responses
    if not found:
        raise UserError(f"{source.label}: none of {account.rows} rows gives a usable response{left_out}{where}")
    if source.examples is not None and found < source.examples:
        raise UserError(
            f"{source.label}: {source.examples} examples asked for, but its {account.rows} rows give only {found} "
            f"responses{left_out}{where}; lower `examples`, or leave it out to take all"
        )


def _check_scores(prepared: PreparedSource) -> None:
    """Refuse feedback with one score for all responses: it teaches nothing, and most often a column was misread."""
    responses = prepared.selection.store.responses
    if prepared.settings.allow_one_score:
        return
    for kind in ("score", "binary"):
        scores = responses["score"][responses["kind"] == KINDS.index(kind)]
        if len(scores) >= _ONE_SCORE_FROM and np.all(scores == scores[0]):
            raise UserError(
                f"{prepared.label}: all {len(scores)} responses of kind {kind!r} have the score {scores[0]:g}; if that "
                "is meant, set this source's allow_one_score: true"
            )


def check_no_source_twice(data: PreparedData, cache_dir: Path) -> None:
    """Refuse two sources with the same rows: a copy, a link or another spelling of a path, read by whatever rules.

    Sources of equal content are different if each `where` asks for something that the other does not. The check of
    the recipe itself compares paths only.

    Raises:
        UserError: names the two sources.
    """
    seen: dict[str, list[PreparedSource]] = {}
    for source in data.all:
        of_this_content = seen.setdefault(read_key_parts(cache_dir, source.key)["content"], [])
        where = set(source.settings.rules.where)
        for other in of_this_content:
            other_where = set(other.settings.rules.where)
            if where <= other_where or other_where <= where:  # all rows of one are among the rows of the other
                raise UserError(f"{source.label}: holds the rows of {other.label}; no row may be used twice")
        of_this_content.append(source)


def check_units_fit(data: PreparedData, tokens_per_micro_batch: int, ranks_together: int, *, max_length: int) -> None:
    """Refuse a pair that does not fit into a micro-batch.

    The two sides are forwarded together, so a pair may be longer than max_length.

    Args:
        ranks_together: `launch.sequence_parallel`; so many ranks hold as many times `tokens_per_micro_batch`.
    Raises:
        UserError: names the pair.
    """
    limit = tokens_per_micro_batch * ranks_together
    given = f"{tokens_per_micro_batch} given"
    if ranks_together > 1:
        given += f", times launch.sequence_parallel {ranks_together} is {limit}"
    for source in data.all:
        store, units_U = source.selection.store, source.selection.units_U
        longest = int(units_U[np.argmax(store.tokens_U[units_U])])
        if store.tokens_U[longest] > limit:
            raise UserError(
                f"train.tokens_per_micro_batch: {given}, but the pair of {store.origin(longest)} has "
                f"{store.tokens_U[longest]} tokens; raise it, or lower data.max_length {max_length}"
            )
