"""How much is in memory at once, and that matmuls stay large."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from uft_ds.kernels.tiles import CPU, GPU, ROW_MULTIPLE, Tile, tile_of

HOST, DEVICE = torch.device("cpu"), torch.device("cuda")
QWEN = 151_936


@pytest.mark.parametrize(
    ("num_tokens", "streams", "chunk_bytes", "tile"),
    [
        (4096, 1, 2**30, Tile(1376, 151_936)),  # 1766 whole rows: three chunks of nearly equal rows
        (4096, 2, 2**30, Tile(832, 151_936)),
        (4096, 1, 128 * 2**20, Tile(208, 151_936)),
        (4096, 2, 128 * 2**20, Tile(96, 151_936)),
        (4096, 1, 16 * 2**20, Tile(512, 4096)),  # fewer than 192 whole rows: columns are cut
        (4096, 2, 16 * 2**20, Tile(512, 4096)),
        (4096, 3, 16 * 2**20, Tile(320, 4096)),  # as wide as with two streams, fewer rows
        (4096, 4, 2**30, Tile(416, 151_936)),
        (520, 1, 16 * 2**20, Tile(272, 7696)),  # two halves, not 512 and 8
        (3, 2, 16 * 2**20, Tile(16, 131_072)),
        (3, 2, 32 * 2**20, Tile(16, 151_936)),  # all there is fits
        (0, 1, 16 * 2**20, Tile(16, 131_072)),
        (4096, 1, 1, Tile(512, 16)),
    ],
)
def test_tiles_by_hand(num_tokens: int, streams: int, chunk_bytes: int, tile: Tile) -> None:
    """Whole rows while there are some hundred of them, columns cut where there are not."""
    assert tile_of(num_tokens, streams, QWEN, HOST, chunk_bytes=chunk_bytes) == tile


def test_each_device_has_its_own_default() -> None:
    """A GPU wants thousands of rows to hide the reading of the weights, a CPU tiles that fit its cache."""
    assert tile_of(8192, 2, QWEN, HOST) == tile_of(8192, 2, QWEN, HOST, chunk_bytes=CPU.chunk_bytes)
    assert tile_of(8192, 2, QWEN, DEVICE) == tile_of(8192, 2, QWEN, DEVICE, chunk_bytes=GPU.chunk_bytes)
    assert tile_of(8192, 2, QWEN, DEVICE).rows >= 1024


@given(
    num_tokens=st.integers(0, 20_000),
    streams=st.integers(1, 6),
    vocabulary=st.integers(1, 300_000),
    chunk_bytes=st.integers(1, 2**31),
    bytes_per_logit=st.sampled_from([4, 8, 16]),
    bytes_per_column=st.sampled_from([0, 4 * 896, 12 * 8192]),
    device=st.sampled_from([HOST, DEVICE]),
)
def test_tiles_keep_to_their_budget(
    num_tokens: int,
    streams: int,
    vocabulary: int,
    chunk_bytes: int,
    bytes_per_logit: int,
    bytes_per_column: int,
    device: torch.device,
) -> None:
    """Whatever the sizes: within the budget or 16 columns or rows, and as wide for one stream as for any number."""
    options: dict[str, Any] = {
        "chunk_bytes": chunk_bytes,
        "bytes_per_logit": bytes_per_logit,
        "bytes_per_column": bytes_per_column,
    }
    tile = tile_of(num_tokens, streams, vocabulary, device, **options)
    assert tile.rows % ROW_MULTIPLE == 0
    assert 1 <= tile.width <= vocabulary
    taken = tile.width * (bytes_per_logit * streams * tile.rows + bytes_per_column)
    is_smallest = tile.width == min(vocabulary, ROW_MULTIPLE) or (streams > 2 and tile.rows == ROW_MULTIPLE)
    assert taken <= chunk_bytes or is_smallest
    assert tile.width == tile_of(num_tokens, 1, vocabulary, device, **options).width
