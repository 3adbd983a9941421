"""What a recipe trains on, for the eye: rows with their masks, and tables of what is taken and what is left out."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from rich.table import Table
from rich.text import Text

from uft_ds.data.chat_tokenizer import ChatTokenizer
from uft_ds.data.example import Sequence
from uft_ds.data.mixture import Steps, epoch_amounts
from uft_ds.data.prepare import PreparedSource
from uft_ds.prepare import PreparedData

PROMPT, SUPERVISED, HEADER = "dim", "black on green", "bold"
OPEN, CLOSE = "⟦", "⟧"
"""Around supervised tokens, for terminals and files without colours."""

_SHOWN_TOKENS = 200
_LONGEST_LABEL = 40


def legend() -> Text:
    return Text.assemble("tokens: ", ("context", PROMPT), "  ", (f"{OPEN}supervised{CLOSE}", SUPERVISED))


def rendered_rows(source: PreparedSource, chat: ChatTokenizer, *, count: int, seed: int, full: bool) -> Iterator[Text]:
    """Sampled units of a source: where they come from, counts, scores, and their tokens with the mask."""
    selection = source.selection
    sample = np.random.default_rng(seed).permutation(len(selection))[:count]
    for index in sorted(int(index) for index in sample):
        for sequence in selection.unit(index):
            yield rendered(sequence, chat, full=full)


def rendered(sequence: Sequence, chat: ChatTokenizer, *, full: bool) -> Text:
    """One sequence: a line of numbers, then its text as the model reads it, control tokens included."""
    responses = sequence.responses
    supervised = sum(response.num_tokens for response in responses)
    scores = ", ".join(f"{response.kind} {response.score:.3g}" for response in responses)
    head = f"{responses[0].origin}: {sequence.num_tokens} tokens, {supervised} supervised; {scores}\n"
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
    """What a run takes of each source."""
    table = Table("data", "kind", "responses", "sequences", "tokens", "per epoch", "left out")
    amounts = epoch_amounts([source.ingredient for source in data.train])
    for part, sources, per_epoch in (
        ("train", data.train, amounts),
        ("held out", data.held_out, [None] * len(data.held_out)),
    ):
        for source, amount in zip(sources, per_epoch, strict=True):
            selection, account = source.selection, source.account
            left_out = [f"{count} {reason}" for reason, count in account.dropped.items()]
            left_out += [f"{account.quarantined} rows quarantined"] if account.quarantined else []
            counts = (selection.num_responses, selection.num_sequences, selection.num_tokens)
            table.add_row(
                Text(f"{part}: {_short(source.label)}"),
                Text(", ".join(sorted(selection.kinds))),
                *(f"{count:,}" for count in counts),
                "" if amount is None else f"{amount:,.1f}".removesuffix(".0"),
                Text(", ".join(left_out) or "-"),
            )
    return table


def left_out_table(data: PreparedData) -> Table:
    """Each reason for which responses were left out or changed, with the first places."""
    table = Table("source", "reason", "responses", "first places", title="left out, or changed", title_justify="left")
    for source in data.all:
        account = source.account
        for counts in (account.dropped, account.changed):
            for reason, count in counts.items():
                places = ", ".join(source.selection.store.places_of(reason))
                table.add_row(Text(_short(source.label)), reason, f"{count:,}", Text(places))
        if account.skipped:
            table.add_row(Text(_short(source.label)), "not selected by where", f"{account.skipped:,} rows", "")
        if account.quarantined:
            table.add_row(Text(_short(source.label)), "bad rows, quarantined", f"{account.quarantined:,} rows", "")
    if not table.row_count:
        table.add_row("-", "nothing", "0", "")
    return table


def steps_line(steps: Steps, examples_per_step: int) -> Text:
    """How long a run over it is."""
    first = steps[0]
    tokens = sum(sequence.num_tokens for sequence in first.sequences)
    return Text(
        f"{len(steps):,} steps of at least {examples_per_step} responses; the first has {len(first.responses)} "
        f"in {len(first.sequences)} sequences, {tokens:,} tokens"
    )


def _decoded(chat: ChatTokenizer, ids: list[int], full: bool, *, keep_start: bool) -> str:
    if full or len(ids) <= _SHOWN_TOKENS:
        return str(chat.tokenizer.decode(ids))
    half = _SHOWN_TOKENS // 2
    head = str(chat.tokenizer.decode(ids[:half])) if keep_start else ""
    cut = len(ids) - (2 * half if keep_start else half)
    return f"{head} [... {cut} tokens ...] {chat.tokenizer.decode(ids[-half:])}"


def _short(label: str) -> str:
    return label if len(label) <= _LONGEST_LABEL else "..." + label[3 - _LONGEST_LABEL :]
