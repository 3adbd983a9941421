"""Merge base and adapter tensor by tensor, so that the memory needed does not depend on the model's size."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from uft_ds.errors import UserError
from uft_ds.export.low_rank import LowRank
from uft_ds.streams.weight_files import TensorInfo, WeightFiles, write_model


def write_merged(
    base: WeightFiles,
    deltas: Mapping[str, LowRank],
    folder: Path,
    *,
    dtype: torch.dtype | None,
    max_shard_bytes: int,
    on_bytes: Callable[[int, int], None] = lambda done, total: None,
    without: Collection[str] = (),
    added: Mapping[str, Tensor] = MappingProxyType({}),
) -> None:
    """Write the weights of the merged model; sums are formed in float32.

    Args:
        without: tensors of the base that are left out. added: tensors that the base does not have, by their names.
        dtype: type of all floating-point tensors; None: each keeps the base's type.
        on_bytes: called with the bytes computed so far and their total.
    Raises:
        UserError: the adapter belongs to another model, a sum is not finite in its type, or the disk is too full.
    """
    for name, delta in deltas.items():
        expected = (delta.b.shape[0], delta.a.shape[1])
        if name not in base.infos:
            raise UserError(f"{base.folder}: holds no {name}, which the adapter changes; it is of another model")
        if base.infos[name].shape != expected:
            raise UserError(
                f"{base.folder}: {name} has shape {list(base.infos[name].shape)}, the adapter is for {list(expected)}"
            )
        if not base.infos[name].dtype.is_floating_point:
            raise UserError(f"{base.folder}: {name} is of type {base.infos[name].dtype}: it cannot be merged into")

    of_base = [info for name, info in base.infos.items() if name not in without]
    further = [TensorInfo(name, tuple(tensor.shape), tensor.dtype) for name, tensor in added.items()]

    def read(name: str) -> Tensor:
        tensor = added[name] if name in added else base.read(name)
        return deltas[name].delta().add_(tensor.float()) if name in deltas else tensor

    infos = [stored_as(info, dtype) for info in (*of_base, *further)]
    write_finite(infos, read, folder, of=base.folder, max_shard_bytes=max_shard_bytes, on_bytes=on_bytes)


def write_finite(
    infos: Sequence[TensorInfo],
    read: Callable[[str], Tensor],
    folder: Path,
    *,
    of: Path,
    max_shard_bytes: int,
    on_bytes: Callable[[int, int], None],
) -> None:
    """Write tensors in the types of `infos`, one at a time in memory.

    Args:
        read: one tensor, in any type.
        of: the folder of the base, for messages.
        on_bytes: called with the bytes computed so far and their total.
    Raises:
        UserError: a value is not finite in its type, or the disk is too full.
    """
    total, done = sum(info.num_bytes for info in infos), 0
    _check_room(folder, total)

    def produce(info: TensorInfo) -> Tensor:
        nonlocal done
        on_bytes(done, total)
        done += info.num_bytes
        stored = read(info.name).to(info.dtype)
        if stored.is_floating_point() and stored.numel() and not _is_finite(stored):
            raise UserError(f"{of}: {info.name}: not finite as {info.dtype}; take another --dtype")
        return stored

    write_model(folder, infos, produce, max_shard_bytes=max_shard_bytes)
    on_bytes(total, total)


def _is_finite(tensor: Tensor) -> bool:
    """Whether all elements are finite, by their minimum and maximum: both are NaN if any element is.

    `isfinite` of every element takes 40 times as long.
    """
    return all(bool(torch.isfinite(value)) for value in torch.aminmax(tensor))


def stored_as(info: TensorInfo, dtype: torch.dtype | None) -> TensorInfo:
    """A tensor as it is written: floating-point ones in `dtype`, if one is given."""
    return replace(info, dtype=dtype) if dtype is not None and info.dtype.is_floating_point else info


def _check_room(folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise UserError(f"{folder.parent}: {num_bytes / 1e9:.3g} GB needed for the weights, {free / 1e9:.3g} GB free")
