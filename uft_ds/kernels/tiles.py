"""How the [tokens, vocabulary] of logits is cut: by rows, and by columns too where memory is short."""

from __future__ import annotations

from dataclasses import dataclass

import torch

ROW_MULTIPLE = 16
"""Rows of a stream in a matmul are padded to this, because a row's place in a matmul must not change its bits.

A BLAS computes rows in blocks, and the last rows of a matrix by other code. Streams stand one below the other;
padded, row i of each stands at the same place of a block (docs/findings.md, "equal rows").
"""


@dataclass(frozen=True)
class Tile:
    """The logits that are in memory at once, of each stream."""

    rows: int
    """Tokens, a multiple of `ROW_MULTIPLE`."""
    width: int
    """Entries of the vocabulary."""


@dataclass(frozen=True)
class Budget:
    """What a device wants of a tile: many rows, because a tile's weights are read from memory once for all of them."""

    chunk_bytes: int
    """For everything that grows with a tile."""
    least_whole_rows: int
    """Where fewer whole rows than this fit, those of two streams together, columns are cut too."""
    most_cut_rows: int
    """Rows of each of two streams where columns are cut."""


# CPU: tiles that fit a cache beat whole rows (benchmarks/token_logps.py on an AMD EPYC, November 2026). GPU: from the
# roofline, not measured: from 1024 rows on, reading the weights hides behind the arithmetic.
CPU = Budget(chunk_bytes=8 * 2**20, least_whole_rows=192, most_cut_rows=512)
GPU = Budget(chunk_bytes=512 * 2**20, least_whole_rows=1024, most_cut_rows=2048)


def tile_of(
    num_tokens: int,
    streams: int,
    vocabulary: int,
    device: torch.device,
    *,
    chunk_bytes: int | None = None,
    bytes_per_logit: int = 4,
    bytes_per_column: int = 0,
) -> Tile:
    """The tile for `num_tokens` rows of each stream that takes `chunk_bytes`, or 16 columns or rows if that is too
    little.

    Whether columns are cut, and how wide, does not depend on the number of streams: the sums of a stream run in the
    same order with others beside it and without. From the third stream on there are fewer rows instead.

    Args:
        chunk_bytes: None for what suits the device.
        bytes_per_logit: of everything of a tile's size that is held at once.
        bytes_per_column: of what is held for each entry of the vocabulary, whatever the rows.
    """
    budget = CPU if device.type == "cpu" else GPU
    budget_bytes = budget.chunk_bytes if chunk_bytes is None else chunk_bytes
    whole_rows = (budget_bytes // vocabulary - bytes_per_column) // bytes_per_logit
    if whole_rows >= min(2 * _round_up(num_tokens), budget.least_whole_rows):
        return Tile(_balanced(num_tokens, whole_rows // streams), vocabulary)
    rows = _balanced(num_tokens, budget.most_cut_rows)
    width = budget_bytes // (bytes_per_logit * 2 * rows + bytes_per_column) // ROW_MULTIPLE * ROW_MULTIPLE
    if streams > 2:
        rows = _balanced(num_tokens, 2 * rows // streams)
    return Tile(rows, min(vocabulary, max(ROW_MULTIPLE, width)))


def _balanced(num_tokens: int, most: int) -> int:
    """Chunks of nearly equal rows: 513 tokens of at most 512 are two halves, not 512 and 1."""
    chunks = max(1, -(-num_tokens // max(ROW_MULTIPLE, most // ROW_MULTIPLE * ROW_MULTIPLE)))
    return _round_up(-(-num_tokens // chunks))


def _round_up(rows: int) -> int:
    return max(1, -(-rows // ROW_MULTIPLE)) * ROW_MULTIPLE
