"""The names of the files in which ranks save their optimiser states; reading them needs no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence


def shard_name(rank: int, world_size: int) -> str:
    return f"rank-{rank:05d}-of-{world_size:05d}.safetensors"


def world_size_of(names: Sequence[str]) -> int | None:
    """The number of ranks that wrote these files, by their names; None if one is missing or the numbers differ."""
    matches = [re.fullmatch(r"rank-(\d{5})-of-(\d{5})\.safetensors", name) for name in names]
    sizes = {int(match[2]) for match in matches if match}
    if len(sizes) != 1:
        return None
    (size,) = sizes
    return size if sorted(names) == [shard_name(rank, size) for rank in range(size)] else None
