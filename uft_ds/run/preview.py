"""Terminal views of a run's data: rows with their loss masks, and tables of what is used and what is left out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from uft_ds.data.example import Sequence
from uft_ds.data.mixture import Steps
from uft_ds.data.sources import PreparedData, PreparedSource
from uft_ds.data.tokens.chat_tokenizer import ChatTokenizer
from uft_ds.host.terminal import as_typed, visible
from uft_ds.recipe.settings import Settings
from uft_ds.recipe.unused import unused

PROMPT, SUPERVISED, HEADER = "dim", "black on green", "bold"
OPEN, CLOSE = "⟦", "⟧"
"""Brackets around supervised tokens, for terminals and files without colours."""

_SHOWN_TOKENS = 200
_MUCH_LEFT_OUT = 0.2
_MANY_PASSES = 10


def legend() -> Text:
    return Text.assemble("tokens: ", ("context", PROMPT), "  ", (f"{OPEN}supervised{CLOSE}", SUPERVISED))


def rendered_rows(source: PreparedSource, chat: ChatTokenizer, *, count: int, seed: int, full: bool) -> Iterator[Text]:
    """Sampled units of a source: origin, token counts, scores, and the text with its loss mask."""
    selection = source.selection
    sample = np.random.default_rng(seed).permutation(len(selection))[:count]
    for index in sorted(int(index) for index in sample):
        for sequence in selection.unit(index):
            yield rendered(sequence, chat, full=full)


def rendered(sequence: Sequence, chat: ChatTokenizer, *, full: bool) -> Text:
    """One sequence: a line of counts and scores, then its text as the model reads it, with control tokens."""
    responses = sequence.responses
    supervised = sum(response.num_tokens for response in responses)
    scores = ", ".join(f"{response.kind} {response.score:.3g}" for response in responses)
    head = (
        f"{visible(as_typed(responses[0].origin))}: {sequence.num_tokens} tokens, {supervised} supervised; {scores}\n"
    )
    ids = sequence.token_ids_T.tolist()
    text = Text.assemble((head, HEADER))
    at = 0
    for response in responses:
        text.append(_decoded(chat, ids[at : response.start], full, keep_start=at == 0), PROMPT)
        text.append(
            OPEN + _decoded(chat, ids[response.start : response.end], full, keep_start=True) + CLOSE, SUPERVISED
        )
        at = response.end
    return text.append("\n")


def data_table(data: PreparedData) -> Table:
    """What a run uses of each source. Column "left out": dropped responses plus quarantined rows."""
    table = _table("", "data", "kind", "responses", "tokens", "per epoch", "left out")
    for part, sources, per_epoch in (
        ("train", data.train, data.epoch_amounts),
        ("held out", data.held_out, [None] * len(data.held_out)),
    ):
        for source, amount in zip(sources, per_epoch, strict=True):
            selection, account = source.selection, source.account
            table.add_row(
                part,
                _path(source.label),
                Text(", ".join(sorted(selection.kinds))),
                f"{selection.num_responses:,}",
                f"{selection.num_tokens:,}",
                "" if amount is None else _amount(amount, selection.num_responses),
                f"{sum(account.dropped.values()) + account.quarantined:,}",
            )
    return table


def _amount(responses: float, of: int) -> str:
    shown = f"{responses:,.1f}".removesuffix(".0")
    passes = responses / of
    return shown if passes == 1 else f"{shown} ({passes:.2g} x)"


def show_data(settings: Settings, data: PreparedData, console: Console) -> None:
    """Print the tables, then notes on settings that may be unintended."""
    console.print(data_table(data))
    left_out = left_out_table(data)
    if left_out is not None:
        console.print(left_out)
    for note in notes(data):
        console.print(note)
    for text in unused(settings.given, data):
        console.print(Text(f"note: {text}"))


def notes(data: PreparedData) -> Iterator[Text]:
    """Notes on data use that may be unintended: much left out, columns not read, rows repeated often."""
    for source in data.all:
        left_out, found = sum(source.account.dropped.values()), len(source.selection.store.responses)
        if left_out > _MUCH_LEFT_OUT * (left_out + found):
            yield Text(f"note: {as_typed(source.label)}: {left_out:,} of {left_out + found:,} responses are left out")
    for source in data.all:
        if source.account.unread:
            named = ", ".join(f"{column} ({rows:,} rows)" for column, rows in source.account.unread.items())
            form = source.settings.rules.format
            yield Text(f"note: {as_typed(source.label)}: columns that format {form} does not read: {named}")
    for source, amount in zip(data.train, data.epoch_amounts, strict=True):
        passes = amount / source.selection.num_responses
        if passes > _MANY_PASSES:
            yield Text(f"note: {as_typed(source.label)}: an epoch goes {passes:.3g} times through its responses")


def device_notes(settings: Settings, *, has_gpu: bool) -> Iterator[Text]:
    """Notes on settings that are slow on the device that a run is about to use."""
    if settings.model.dtype == "bfloat16" and not has_gpu:
        yield Text(
            "note: model.dtype: bfloat16 on a CPU: most CPUs compute in it 10 to 70 times slower than in float32; "
            "model.dtype=float32 needs twice the memory for the base"
        )


def left_out_table(data: PreparedData) -> Table | None:
    """Drop statistics: each reason for which responses were left out or changed, with the first places, or None."""
    table = _table("source", "reason", "number", "first places", title="left out, or changed", title_justify="left")
    for source in data.all:
        account = source.account
        for counts in (account.dropped, account.changed):
            for reason, count in counts.items():
                places = "\n".join(source.selection.store.places_of(reason))  # a place is read as a whole
                table.add_row(_path(source.label), reason, f"{count:,}", _path(places))
        if account.skipped:
            table.add_row(_path(source.label), "not selected by where", f"{account.skipped:,} rows", "")
        if account.quarantined:
            first = [f"{place}: {reason}" for place, reason in source.first_bad_rows]
            file = f"all, with reasons: {source.quarantine_file}"
            reason = "bad rows, quarantined"
            table.add_row(
                _path(source.label),
                reason,
                f"{account.quarantined:,} rows",
                _path("\n".join([*first, file])),
            )
    return table if table.row_count else None


def _path(text: str) -> Text:
    """Text with paths, for a cell."""
    return Text(visible(as_typed(text)))


def steps_line(steps: Steps, examples_per_step: int) -> Text:
    """A line with the number of steps and the size of the first one."""
    first = steps[0]
    tokens = sum(sequence.num_tokens for sequence in first.sequences)
    holds = f"{len(first.responses)} responses in {len(first.sequences)} sequences, {tokens:,} tokens"
    if len(steps) == 1:
        return Text(f"1 step: {holds}")
    return Text(f"{len(steps):,} steps of at least {examples_per_step} responses; the first has {holds}")


def amount_line(steps: Steps, data: PreparedData, done: int = 0) -> Text:
    """A line with what the steps hold in all. done: the number of steps that are done already."""
    in_all, per_epoch = steps.num_responses(), sum(data.epoch_amounts)
    passes = f"{in_all / per_epoch:.3g}"
    text = f"{in_all:,} responses in all, {passes} epoch{'s' * (passes != '1')} of {per_epoch:,.0f}"
    if done == len(steps):
        return Text(f"{text}; all steps are done")
    if done:
        text += f"; {done:,} steps are done, the remaining {len(steps) - done:,} hold {steps.num_responses(done):,}"
    return Text(text)


def _table(*headers: str, **options: Any) -> Table:
    """A table whose text columns wrap in a narrow terminal and are never cut: a place ends with its line number."""
    numbers = {"responses", "tokens", "per epoch", "left out", "number"}
    columns = [
        Column(
            header,
            overflow="fold",
            justify="right" if header in numbers else "left",
            no_wrap=header in {*numbers, "", "kind"},
        )
        for header in headers
    ]
    return Table(*columns, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), **options)


def _decoded(chat: ChatTokenizer, ids: list[int], full: bool, *, keep_start: bool) -> str:
    if full or len(ids) <= _SHOWN_TOKENS:
        return visible(str(chat.tokenizer.decode(ids)))
    half = _SHOWN_TOKENS // 2
    head = visible(str(chat.tokenizer.decode(ids[:half]))) if keep_start else ""
    cut = len(ids) - (2 * half if keep_start else half)
    return f"{head} [... {cut} tokens ...] {visible(str(chat.tokenizer.decode(ids[-half:])))}"
