"""Optimiser-state shards: each rank writes one safetensors file; `Shards` reads all of them by parameter.

Because pieces are addressed by parameter and position, a checkpoint can be read by another number of ranks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from uft_ds.checkpoint.shard_names import shard_name, world_size_of
from uft_ds.checkpoint.tensor_file import save_tensors
from uft_ds.engine.optimizer_state import Piece
from uft_ds.errors import UserError

_PIECES = "pieces"
"""Key of the file's metadata: [[parameter, shape, start, elements], ...]."""


def write_shard(path: Path, pieces: Sequence[Piece], others: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Write a rank's pieces and its private tensors (`others`), such as the states of its random generators.

    Returns:
        All tensors, by their names in the file.
    Raises:
        OSError: the file cannot be written.
    """
    layout = [(piece.name, piece.shape, piece.start, piece.numel) for piece in pieces]
    tensors = {f"{key}:{piece.name}": tensor for piece in pieces for key, tensor in piece.tensors.items()}
    tensors |= others
    save_tensors(path, tensors, {_PIECES: json.dumps(layout)})
    return tensors


class Shards:
    """The pieces in all ranks' files, indexed by parameter.

    Raises:
        UserError: a file is missing or cannot be read; names it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.files = sorted(folder.glob("*.safetensors"))
        self._where: dict[str, list[tuple[int, int, Path]]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        names = [path.name for path in self.files]
        if world_size_of(names) is None:
            raise UserError(f"{folder}: expected the states of all ranks, such as {shard_name(0, 1)}; found {names}")
        for path in self.files:
            for name, shape, start, numel in self._layout(path):
                self._where.setdefault(name, []).append((start, numel, path))
                self.shapes[name] = tuple(shape)

    @property
    def world_size(self) -> int:
        """The number of ranks that wrote the checkpoint."""
        return len(self.files)

    def read(self, name: str, key: str, start: int, numel: int) -> Tensor:
        """`numel` consecutive elements of a flattened parameter's state: [numel], float32, on the host.

        Raises:
            UserError: some of the elements are in no file.
        """
        found, covered = torch.empty(numel, dtype=torch.float32), 0
        # Visited by position: a piece that begins behind the covered range leaves a gap, reported below.
        for at, length, path in sorted(self._where.get(name, []), key=lambda piece: piece[0]):
            first, last = max(start + covered, at), min(start + numel, at + length)
            if first == start + covered and last > first:
                with _opened(path) as file:
                    found[covered : last - start] = file.get_slice(f"{key}:{name}")[first - at : last - at]
                covered = last - start
        if covered < numel:
            raise UserError(
                f"{self._folder}: {key} of {name}: elements {start + covered} to {start + numel} are in no rank's file"
            )
        return found

    def own(self, rank: int, names: Sequence[str]) -> dict[str, Tensor]:
        """A rank's private tensors. Only meaningful if the number of ranks has not changed."""
        with _opened(self.files[rank]) as file:
            return {name: file.get_tensor(name) for name in names if name in set(file.keys())}

    def _layout(self, path: Path) -> list[tuple[str, list[int], int, int]]:
        with _opened(path) as file:
            try:
                layout = json.loads((file.metadata() or {})[_PIECES])
                pieces = [
                    (str(name), [int(size) for size in shape], int(start), int(numel))
                    for name, shape, start, numel in layout
                ]
            except (KeyError, ValueError, TypeError, RecursionError):
                raise UserError(f"{path}: not a rank's state: it lacks the list of its pieces") from None
        for name, *_ in pieces:
            # Names become folders of a universal checkpoint, so a name must not be able to leave its folder.
            if not re.fullmatch(r"\w[\w-]*(\.\w[\w-]*)*", name):
                raise UserError(f"{path}: {name!r}: not the name of a parameter")
        return pieces


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
