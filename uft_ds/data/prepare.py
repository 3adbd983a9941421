"""From a recipe's sources to tokenised sequences, with an account of everything that was left out."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from uft_ds.data.example import Response, Sequence
from uft_ds.data.formats import FORMATS
from uft_ds.data.reading import read_table
from uft_ds.data.tokenize import ChatTokenizer, keep_first, tokenize
from uft_ds.errors import UserError


@dataclass(frozen=True)
class Source:
    """What to read: the recipe's entry as plain values."""

    format: str
    path: str
    split: str | None
    examples: int | None
    score: float | None

    @property
    def label(self) -> str:
        return self.path + (f"[{self.split}]" if self.split else "")

    @property
    def seed_name(self) -> str:
        """What its order is drawn from, besides the seed: the label without folders, so that data may move."""
        return Path(self.label).name


@dataclass(frozen=True)
class PreparedSource:
    """The chosen sequences of one source.

    dropped: responses left out, by reason; dropped_origins: up to three places for each reason.
    """

    label: str
    sequences: tuple[Sequence, ...]
    dropped: dict[str, int]
    dropped_origins: dict[str, tuple[str, ...]]

    @property
    def num_responses(self) -> int:
        return sum(len(sequence.responses) for sequence in self.sequences)

    @property
    def num_tokens(self) -> int:
        return sum(sequence.num_tokens for sequence in self.sequences)


def prepare_source(
    source: Source,
    chat: ChatTokenizer,
    *,
    max_length: int,
    too_long: str,
    merge: bool,
    seed: int,
    on_row: Callable[[int, int], None] = lambda done, total: None,
) -> PreparedSource:
    """Read, check and tokenise one source.

    With `examples`, rows are visited in an order drawn from (seed, source) until that many responses are
    found, so a small share of a large data set costs a small share of its tokenisation.

    Raises:
        UserError: a bad row (file:line), nothing usable, or fewer responses than asked for.
    """
    table = read_table(source.path, source.split)
    order = range(len(table)) if source.examples is None else _drawn_order(source, len(table), seed)
    wanted = source.examples if source.examples is not None else float("inf")
    sequences: list[Sequence] = []
    found = 0
    dropped: Counter[str] = Counter()
    origins: dict[str, tuple[str, ...]] = {}
    for visited, index in enumerate(order, start=1):
        origin = table.origin(index)
        try:
            example = FORMATS[source.format](table.rows[index], score=source.score, origin=origin)
        except ValueError as error:
            raise UserError(f"{origin}: {error} (format {source.format})") from None
        tokenized = tokenize(example, chat, max_length=max_length, merge=merge)
        for reason, count in tokenized.dropped.items():
            if reason == "longer than max_length" and too_long == "refuse":
                raise UserError(
                    f"{origin}: a response ends past data.max_length {max_length}; raise it, or set data.too_long: drop"
                )
            dropped[reason] += count
            origins[reason] = (*origins.get(reason, ()), origin)[:3]
        for sequence in tokenized.sequences:
            kept = keep_first(sequence, int(min(len(sequence.responses), wanted - found)))
            if kept.responses:
                sequences.append(kept)
                found += len(kept.responses)
        on_row(visited, len(table))
        if found >= wanted:
            break
    prepared = PreparedSource(source.label, tuple(sequences), dict(dropped), origins)
    _check_found(prepared, source, len(table))
    return prepared


def _drawn_order(source: Source, num_rows: int, seed: int) -> Iterable[int]:
    rng = np.random.default_rng([seed, zlib.crc32(source.seed_name.encode())])
    return (int(index) for index in rng.permutation(num_rows))


def _check_found(prepared: PreparedSource, source: Source, num_rows: int) -> None:
    reasons = "; ".join(
        f"{count} {reason} (first: {', '.join(prepared.dropped_origins[reason])})"
        for reason, count in prepared.dropped.items()
    )
    left_out = f"; left out: {reasons}" if reasons else ""
    if not prepared.sequences:
        raise UserError(f"{source.label}: none of {num_rows} rows gives a usable response{left_out}")
    if source.examples is not None and prepared.num_responses < source.examples:
        raise UserError(
            f"{source.label}: {source.examples} examples asked for, but its {num_rows} rows give only "
            f"{prepared.num_responses} responses{left_out}; lower `examples`, or leave it out to take all"
        )


_SCHEMA = pa.schema(
    [
        ("token_ids", pa.list_(pa.int32())),
        ("start", pa.list_(pa.int32())),
        ("end", pa.list_(pa.int32())),
        ("score", pa.list_(pa.float64())),
        ("kind", pa.list_(pa.string())),
        ("origin", pa.list_(pa.string())),
    ]
)


def write_sequences(path: Path, sequences: Iterable[Sequence]) -> None:
    """Store sequences as an Arrow file, which all ranks of a machine map into the same memory."""
    rows = [
        {
            "token_ids": sequence.token_ids_T,
            **{name: [getattr(r, name) for r in sequence.responses] for name in _SCHEMA.names[1:]},
        }
        for sequence in sequences
    ]
    temporary = path.with_suffix(".tmp")
    with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as writer:
        writer.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA))
    temporary.replace(path)


def read_sequences(path: Path) -> tuple[Sequence, ...]:
    """What `write_sequences` stored."""
    table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    columns = [table.column(name) for name in _SCHEMA.names]
    return tuple(
        Sequence(
            columns[0][row].values.to_numpy(zero_copy_only=True),
            tuple(Response(*fields) for fields in zip(*(c[row].as_py() for c in columns[1:]), strict=True)),
        )
        for row in range(table.num_rows)
    )
