"""How the [tokens, vocabulary] of logits is cut: by rows, and by columns too where memory is short."""

from __future__ import annotations

from dataclasses import dataclass

import torch

ROW_MULTIPLE = 16
"""Rows of a stream in a matmul are padded to this, because a row's place in a matmul must not change its bits.

A BLAS computes rows in blocks, and the last rows of a matrix by other code. Policy and reference stand one below
the other; padded, row i of both stands at the same place of a block. Measured (MKL, 800 random shapes): 19 pairs of
equal rows differed in a last bit without padding, none with it.
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
    """float32 logits of all streams, and a float32 copy of the weights where they must be cast."""
    least_rows: int
    """With fewer rows of the whole vocabulary than this, in all streams, columns are cut too."""
    most_rows: int
    """Of each stream, where columns are cut."""


# On CPUs a tile that fits the cache beats whole rows (benchmarks/token_logps.py). The GPU's numbers are from its
# roofline, not measured: from 1024 rows on, reading the weights hides behind the arithmetic.
CPU = Budget(chunk_bytes=16 * 2**20, least_rows=192, most_rows=512)
GPU = Budget(chunk_bytes=512 * 2**20, least_rows=1024, most_rows=2048)


def tile_of(
    num_tokens: int,
    streams: int,
    weight_shape: tuple[int, int],
    device: torch.device,
    *,
    chunk_bytes: int | None = None,
    cast: bool = False,
) -> Tile:
    """The tile for `num_tokens` rows of 1 or 2 streams; however little chunk_bytes is, 16 rows and 16 columns.

    Whether columns are cut, and how wide, does not depend on the number of streams: the policy's sums run in the
    same order with the reference beside it and without.

    Args:
        weight_shape: (V, D) of the head.
        chunk_bytes: None for what suits the device.
        cast: the head's weights are copied in float32, a tile of them at a time.
    """
    vocabulary, dim = weight_shape
    budget = CPU if device.type == "cpu" else GPU
    budget_bytes = budget.chunk_bytes if chunk_bytes is None else chunk_bytes
    copy_bytes = 4 * dim if cast else 0  # per column
    whole_rows = (budget_bytes // vocabulary - copy_bytes) // 4
    if whole_rows >= min(2 * _round_up(num_tokens), budget.least_rows):
        return Tile(_balanced(num_tokens, whole_rows // streams), vocabulary)
    rows = _balanced(num_tokens, budget.most_rows)
    width = budget_bytes // (4 * 2 * rows + copy_bytes) // ROW_MULTIPLE * ROW_MULTIPLE
    return Tile(rows, min(vocabulary, max(ROW_MULTIPLE, width)))


def _balanced(num_tokens: int, most: int) -> int:
    """Chunks of nearly equal rows: 513 tokens of at most 512 are two halves, not 512 and 1."""
    chunks = max(1, -(-num_tokens // max(ROW_MULTIPLE, most // ROW_MULTIPLE * ROW_MULTIPLE)))
    return _round_up(-(-num_tokens // chunks))


def _round_up(rows: int) -> int:
    return max(1, -(-rows // ROW_MULTIPLE)) * ROW_MULTIPLE
