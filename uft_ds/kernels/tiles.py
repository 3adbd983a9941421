"""How the [tokens, vocabulary] matrix of logits is cut: into rows, and also into columns if memory is short."""

from __future__ import annotations

from dataclasses import dataclass

import torch

ROW_MULTIPLE = 16
"""The rows of each stream in a matmul are padded to a multiple of this, so that equal rows give equal bits.

A BLAS computes rows in blocks, and uses other code for the last rows of a matrix. The streams are stacked; with
padding, row i of each stream is at the same place in a block (docs/findings.md, "Equal rows, unequal bits").
"""


@dataclass(frozen=True)
class Tile:
    """The part of the logits that is in memory at once, for each stream."""

    rows: int
    """Tokens, a multiple of `ROW_MULTIPLE`."""
    width: int
    """Columns: entries of the vocabulary."""


@dataclass(frozen=True)
class Budget:
    """A device's limits for a tile. Many rows are better, because a tile's weights are read once for all its rows."""

    chunk_bytes: int
    """Memory for everything that grows with a tile."""
    least_whole_rows: int
    """If fewer whole rows than this fit (rows of two streams together), columns are cut too."""
    most_cut_rows: int
    """If columns are cut: the most rows of each of two streams."""


# CPU: tiles that fit a cache are faster than whole rows (benchmarks/token_logps.py on an AMD EPYC, November 2026).
# GPU: by the roofline model, not measured: from 1024 rows on, reading the weights takes less time than the arithmetic.
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
    """The tile for `num_tokens` rows of each stream that fits `chunk_bytes`, with at least 16 rows and columns.

    Whether columns are cut, and their width, does not depend on the number of streams. So the sums of one stream run in
    the same order with and without other streams. More than two streams get fewer rows instead.

    Args:
        chunk_bytes: None: the device's default.
        bytes_per_logit: for all buffers of a tile's size that are held at once.
        bytes_per_column: for all buffers with one entry or row per column, independent of the rows.
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
    """Rows of a chunk, for chunks of nearly equal size: 513 tokens in at most 512 rows are two halves, not 512 + 1."""
    chunks = max(1, -(-num_tokens // max(ROW_MULTIPLE, most // ROW_MULTIPLE * ROW_MULTIPLE)))
    return _round_up(-(-num_tokens // chunks))


def _round_up(rows: int) -> int:
    """To a multiple of `ROW_MULTIPLE`, at least one."""
    return max(1, -(-rows // ROW_MULTIPLE)) * ROW_MULTIPLE
