"""Terminal views of a run's data: rows with their loss masks, and tables of what is used and what is left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from uft_ds.data.asked import Asked, AskedSource
from uft_ds.data.example import Kind, Sequence
from uft_ds.data.formats.columns import OF_META, is_medium
from uft_ds.data.formats.fields import default_score
from uft_ds.data.formats.table import FORMATS
from uft_ds.data.mixture import Steps
from uft_ds.data.sources import PreparedData, PreparedSource, SourceSettings
from uft_ds.data.store.building import RowRules
from uft_ds.data.tokens.chat_tokenizer import ChatTokenizer
from uft_ds.host.terminal import as_typed, visible
from uft_ds.recipe.online import unused_of_generator
from uft_ds.recipe.settings import DataSettings, Settings
from uft_ds.recipe.unused import unused

PROMPT, SUPERVISED, HEADER = "dim", "black on green", "bold"
OPEN, CLOSE = "⟦", "⟧"
"""Brackets around supervised tokens, for terminals and files without colours."""

_SHOWN_TOKENS = 200
_MUCH_LEFT_OUT = 0.2
_MANY_PASSES = 10
_UNLIMITED = 10_000
"""Columns of a terminal that breaks no line."""


def legend() -> Text:
    return Text.assemble("tokens: ", ("context", PROMPT), "  ", (f"{OPEN}supervised{CLOSE}", SUPERVISED))


def rendered_rows(source: PreparedSource, chat: ChatTokenizer, *, count: int, seed: int, full: bool) -> Iterator[Text]:
    """Sampled units of a source: origin, token counts, scores, and the text with its loss mask."""
    selection, asked = source.selection, source.settings.asked
    sample = np.random.default_rng(seed).permutation(len(selection))[:count]
    for index in sorted(int(index) for index in sample):
        if asked is not None:
            yield _rendered_prompt(AskedSource.of(source).selection, index, chat, full=full)
            continue
        for sequence in selection.unit(index):
            yield rendered(_with_sides(sequence, source.settings.rules), chat, full=full)


def _rendered_prompt(asked: Asked, index: int, chat: ChatTokenizer, *, full: bool) -> Text:
    """A prompt that the policy will answer: a line of counts, then its text as the model reads it."""
    ids = asked.prompt(index).token_ids_T.tolist()
    head = (
        f"{visible(as_typed(asked.origin(index)))}: {len(ids)} tokens; to be answered {asked.answers} times, by up to "
        f"{asked.answer_tokens} tokens\n"
    )
    return Text.assemble((head, HEADER), (_decoded(chat, ids, full, keep_start=True), PROMPT), "\n")


def _with_sides(sequence: Sequence, rules: RowRules) -> Sequence:
    """The sequence, with the side in its origin where it was one of a pair that has been split.

    A row of our formats gives one pair, or with `ultrafeedback` several answers that are no pair; what a row of another
    package's format gives is not known, and its items keep their numbers.
    """
    if not rules.split_pairs or rules.format not in FORMATS or rules.format == "ultrafeedback":
        return sequence
    sides = {", item 1": " (chosen)", ", item 2": " (rejected)"}

    def named(origin: str) -> str:
        return next((origin.removesuffix(end) + side for end, side in sides.items() if origin.endswith(end)), origin)

    return replace(sequence, responses=tuple(replace(one, origin=named(one.origin)) for one in sequence.responses))


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
    numbers = ("responses", "tokens", "per epoch", "left out")
    columns = [Column(header, justify="right" if header in numbers else "left") for header in ("", "kind", *numbers)]
    # Paths come last: a terminal that is too narrow folds them by itself, and they are copied whole.
    table = Table(*columns, "data", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for part, sources, per_epoch in (
        ("train", data.train, data.epoch_amounts),
        ("held out", data.held_out, [None] * len(data.held_out)),
    ):
        for source, amount in zip(sources, per_epoch, strict=True):
            selection, account = source.selection, source.account
            table.add_row(
                part,
                Text(_kinds_of(source)),
                f"{source.num_responses:,}",
                f"{selection.num_tokens:,}",
                "" if amount is None else _amount(amount, source.num_responses),
                f"{sum(account.dropped.values()) + account.quarantined:,}",
                Text(visible(as_typed(source.label))),
            )
    return table


def _kinds_of(source: PreparedSource) -> str:
    asked = source.settings.asked
    if asked is None:
        return _kinds(source.selection.responses_of_kind)
    return f"{source.selection.num_responses:,} prompts x {asked.answers}"


def _kinds(responses: Mapping[Kind, int]) -> str:
    """The kinds of a source; the number of responses of each if there are several, one on each line."""
    if len(responses) < 2:
        return "".join(responses)
    return "\n".join(f"{kind} {count:,}" for kind, count in responses.items())


def _amount(responses: float, of: int) -> str:
    shown = f"{responses:,.1f}".removesuffix(".0")
    passes = responses / of
    return shown if passes == 1 else f"{shown} ({passes:.2g} x)"


def show_data(settings: Settings, data: PreparedData, console: Console, *, typed: DataSettings | None = None) -> None:
    """Print the tables, then notes on settings that may be unintended.

    Args:
        typed: the data's settings with the paths that the user typed, which are shown instead of absolute ones.
    """
    data = data if typed is None else _as_typed(data, typed)
    for line in console.render_lines(data_table(data), console.options.update(max_width=_UNLIMITED), pad=False):
        unbroken = Text.assemble(*((part.text, part.style or "") for part in line))
        unbroken.rstrip()
        console.print(unbroken, soft_wrap=True)
    left_out = left_out_lines(data)
    if left_out is not None:
        console.print(left_out, soft_wrap=True)
    for note in (*notes(data), *_notes_on_steps(settings, data), *_notes_on_base(settings)):
        console.print(note, soft_wrap=True)  # a path in it is not broken
    for text in (*unused(settings.given, data), *unused_of_generator(settings.generator)):
        console.print(Text(f"note: {text}"), soft_wrap=True)


def _as_typed(data: PreparedData, typed: DataSettings) -> PreparedData:
    def renamed(source: PreparedSource, path: str) -> PreparedSource:
        settings = replace(source.settings, path=path)
        names = tuple(name.replace(source.settings.path, path, 1) for name in source.names)
        store = source.selection.store.renamed(settings.label, names)
        return replace(source, settings=settings, selection=replace(source.selection, store=store))

    def all_renamed(
        sources: tuple[PreparedSource, ...], given: tuple[SourceSettings, ...]
    ) -> tuple[PreparedSource, ...]:
        return tuple(renamed(source, entry.path) for source, entry in zip(sources, given, strict=True))

    return PreparedData(all_renamed(data.train, typed.sources), all_renamed(data.held_out, typed.held_out))


def notes(data: PreparedData) -> Iterator[Text]:
    """Notes on data use that may be unintended: another scale, much left out, columns not read, many passes."""
    for source in data.all:
        score_range, scores = source.settings.rules.score_range, source.account.scores
        if score_range is not None and scores is not None:
            then = ", then score_map applies" if source.settings.score_map is not None else ""
            given = f"scores from {scores.low:g} to {scores.high:g} found"
            mapped = f"score_range maps {score_range[0]:g} to 0 and {score_range[1]:g} to 1"
            yield Text(f"note: {as_typed(source.label)}: {given}; {mapped}{then}")
    for source in data.all:
        left_out, found = sum(source.account.dropped.values()), len(source.selection.store.responses)
        if left_out > _MUCH_LEFT_OUT * (left_out + found):
            yield Text(f"note: {as_typed(source.label)}: {left_out:,} of {left_out + found:,} responses are left out")
    for source in data.all:
        unread = source.account.unread
        if like_a_score := {column: rows for column, rows in unread.items() if column.startswith(OF_META)}:
            yield Text(
                f"note: {as_typed(source.label)}: not read: {_with_rows(like_a_score)}; these rows train as answers of "
                f"score {default_score(source.settings.rules.score):g}. If it is their score, it belongs beside "
                "'response'"
            )
        if media := [column for column, given in source.settings.rules.columns if given is None and is_medium(column)]:
            yield Text(
                f"note: {as_typed(source.label)}: columns leaves out {', '.join(media)}: only text is trained, and it "
                "lacks what it speaks of where a row had one; a placeholder such as <image> in it is read as text, "
                "unless the model has such a token"
            )
        if columns := {column: rows for column, rows in unread.items() if column not in like_a_score}:
            named = _with_rows(columns)
            form = source.settings.rules.format
            what = f"columns that format {form} does not read" if source.settings.asked is None else "for the scorer"
            yield Text(f"note: {as_typed(source.label)}: {what}: {named}")
    for source, amount in zip(data.train, data.epoch_amounts, strict=True):
        held = source.num_responses
        passes = amount / held
        if passes > _MANY_PASSES:
            yield Text(f"note: {as_typed(source.label)}: an epoch goes {passes:.3g} times through its responses")
        if source.portion.share is not None and round(amount) < held:
            yield Text(
                f"note: {as_typed(source.label)}: share takes {amount:,.0f} of its {held:,} responses in an epoch; "
                "the others are not used in it"
            )


def _with_rows(columns: Mapping[str, int]) -> str:
    return ", ".join(f"{column} ({rows:,} rows)" for column, rows in columns.items())


def _notes_on_steps(settings: Settings, data: PreparedData) -> Iterator[Text]:
    held, taken = sum(data.epoch_amounts), settings.train.examples_per_step
    if held < taken:
        is_one = settings.train.steps is None and settings.train.epochs == 1
        follows = "the run is one smaller step" if is_one else f"a step goes {taken / held:.2g} times through the data"
        yield Text(
            f"note: an epoch holds {held:,.0f} responses, fewer than the {taken} of a step (train.examples_per_step): "
            f"{follows}"
        )


def _notes_on_base(settings: Settings) -> Iterator[Text]:
    model = settings.model
    if model.revision is not None and Path(model.base).exists():
        yield Text(
            f"note: model.revision: {model.revision} given, but {as_typed(model.base)} is a local folder, which is "
            "read as it is"
        )


def device_notes(settings: Settings, *, has_gpu: bool) -> Iterator[Text]:
    """Notes on settings that are slow on the device that a run is about to use."""
    if settings.model.dtype == "bfloat16" and not has_gpu:
        yield Text(
            "note: model.dtype: bfloat16 on a CPU: most CPUs compute in it 10 to 70 times slower than in float32; "
            "model.dtype=float32 needs twice the memory for the base"
        )


def left_out_lines(data: PreparedData) -> Text | None:
    """Drop statistics: each reason for which responses were left out or changed, with the first places; or None.

    A place has a line of its own, so that it can be copied.
    """
    lines: list[str] = []
    for source in data.all:
        account, store = source.account, source.selection.store
        found = [
            (f"{count:,} {reason}", list(store.places_of(reason)))
            for counts in (account.dropped, account.changed)
            for reason, count in counts.items()
        ]
        if account.skipped:
            found.append((f"{account.skipped:,} rows not selected by where", []))
        if account.quarantined:
            first = [f"{place}: {reason}" for place, reason in source.first_bad_rows]
            found.append(
                (f"{account.quarantined:,} bad rows, quarantined", [*first, f"all of them: {source.quarantine_file}"])
            )
        if found:
            lines.append(f"  {source.label}")
        for what, places in found:
            lines += [f"    {what}{', the first:' if places else ''}", *(f"      {place}" for place in places)]
    return (
        Text("\n".join(["left out, or changed:", *(visible(as_typed(line)) for line in lines), ""])) if lines else None
    )


def steps_line(steps: Steps, examples_per_step: int) -> Text:
    """A line with the number of steps and the size of the first one, and of the last one if that holds fewer."""
    first = steps[0]
    tokens = sum(sequence.num_tokens for sequence in first.sequences)
    holds = f"{len(first.responses)} responses in {len(first.sequences)} sequences, {tokens:,} tokens"
    if len(steps) == 1:
        return Text(f"1 step: {holds}")
    last = steps.num_responses(len(steps) - 1)
    if last < examples_per_step and len(steps) == 2:
        return Text(f"2 steps, of {len(first.responses)} and {last} responses; the first has {holds}")
    but = f", the last of {last}" if last < examples_per_step else ""
    return Text(f"{len(steps):,} steps of at least {examples_per_step} responses{but}; the first has {holds}")


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


def _decoded(chat: ChatTokenizer, ids: list[int], full: bool, *, keep_start: bool) -> str:
    if full or len(ids) <= _SHOWN_TOKENS:
        return visible(str(chat.tokenizer.decode(ids)))
    half = _SHOWN_TOKENS // 2
    head = visible(str(chat.tokenizer.decode(ids[:half]))) if keep_start else ""
    cut = len(ids) - (2 * half if keep_start else half)
    return f"{head} [... {cut} tokens ...] {visible(str(chat.tokenizer.decode(ids[-half:])))}"
