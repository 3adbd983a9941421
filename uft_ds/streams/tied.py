"""Refuse a base that says that two weights are one, while its files hold two that differ.

transformers warns and loads such weights apart. Under ZeRO-3 it compares the empty placeholders of sharded parameters,
finds them equal, and ties them, so the run would train on another model than `uft chat` talks to.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from uft_ds.errors import UserError
from uft_ds.streams.stored_names import origins
from uft_ds.streams.weight_files import WeightFiles


def check_tied(folder: Path, model: Any, empty: Mapping[str, Tensor]) -> None:
    """Refuse a folder whose config.json ties two weights that its files store with different values.

    Only the tied tensors are read, and only if both are stored.

    Args:
        model: the model of the folder's config.json on the meta device.
        empty: as for `stored_twice`.
    Raises:
        UserError: names both tensors and what to do.
    """
    for one, other in stored_twice(model, empty):
        weights = WeightFiles(folder)
        if not _same_values(weights.read(one), weights.read(other)):
            raise UserError(
                f"model.base: {folder}: {one} and {other} differ, but its config.json says tie_word_embeddings: true, "
                "which makes them one; set tie_word_embeddings: false in config.json if the model has both, or remove "
                f"{one} from its weight files if it has only the embedding"
            )


def stored_twice(model: Any, empty: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """Pairs of stored tensors that the model's config makes one parameter: the head first, then the embedding.

    Args:
        model: on the meta device, without adapters.
        empty: stored tensors by their names in the files, on the meta device.
    """
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    if not tied:
        return []
    found = origins(model, empty)
    pairs = [(found.get(name), found.get(owner)) for name, owner in tied.items()]
    return [(a.names[0], b.names[0]) for a, b in pairs if a and b and a.is_one_tensor and b.is_one_tensor]


def _same_values(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold equal numbers, in whatever type; NaN equals NaN, because loading refuses it anyway."""
    if one.shape != other.shape:
        return False
    return torch.equal(one, other) or torch.equal(one.float().nan_to_num(), other.float().nan_to_num())
