"""One rank's part of a checkpoint: copied to host memory while training waits, written while training continues.

`writer.py` calls both and agrees with the other ranks when a checkpoint is complete.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from uft_ds.checkpoint.folder import ADAPTER, ADAPTER_WEIGHTS, OPTIMIZER
from uft_ds.checkpoint.generators import generator_states
from uft_ds.checkpoint.manifest import Written
from uft_ds.checkpoint.owner import Owner
from uft_ds.checkpoint.shard_names import shard_name
from uft_ds.checkpoint.shards import write_shard
from uft_ds.checkpoint.state import TRAINER, Position, write_position
from uft_ds.checkpoint.tensor_file import check_same, save_tensors
from uft_ds.engine.engine import Engine
from uft_ds.engine.optimizer_state import Piece, pieces_of
from uft_ds.errors import CheckFailed
from uft_ds.host.files import sha256, sync
from uft_ds.known.cache import REFERENCE_TABLE, Known
from uft_ds.known.store import LogpTable, write_table
from uft_ds.streams.adapters import adapter_tensors
from uft_ds.streams.policy import Adapted, Policy, adapted, trains_all


@dataclass(frozen=True)
class OfFirstRank:
    """The files that only rank 0 writes.

    adapter: tensors by PEFT's names; of a reward model with its head. None where all parameters are trained: their
    values are in the optimiser's state alone, which each rank writes for itself.
    beside: the contents of the files beside these tensors, by name.
    reference: the table of log-probs, and the identity of its reference. owner: whose checkpoint it is.
    """

    adapter: Mapping[str, Tensor] | None
    beside: Mapping[str, bytes]
    reference: tuple[LogpTable, str]
    owner: Owner | None


@dataclass(frozen=True)
class Snapshot:
    """One rank's part of a checkpoint in host memory; training does not change it afterwards."""

    position: Position
    pieces: tuple[Piece, ...]
    generators: Mapping[str, Tensor]
    rank: int
    world_size: int
    first: OfFirstRank | None


def take_snapshot(
    engine: Engine,
    policy: Policy,
    position: Position,
    reference: Known,
    beside: Mapping[str, bytes],
    owner: Owner | None,
) -> Snapshot:
    """Copy everything to host memory. Every rank must call it: the adapter is gathered, the optimiser state is not.

    Args:
        beside: as in `OfFirstRank`.
    """
    adapter = None if trains_all(policy) else _adapter_of(engine, adapted(policy))
    first = OfFirstRank(adapter, beside, reference.table(), owner) if engine.rank == 0 else None
    pieces = tuple(
        Piece(piece.name, piece.shape, piece.start, {k: t.to("cpu", copy=True) for k, t in piece.tensors.items()})
        for piece in pieces_of(engine.deepspeed)
    )
    return Snapshot(position, pieces, generator_states(), engine.rank, engine.world_size, first)


def _adapter_of(engine: Engine, policy: Adapted) -> dict[str, Tensor]:
    """The adapter in host memory on rank 0, elsewhere nothing. Every rank must call it."""
    with engine.gathered_trainable() as named:
        if engine.rank != 0:
            return {}
        tensors = adapter_tensors(policy, named)
        return {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def write_snapshot(snapshot: Snapshot, folder: Path) -> dict[str, Written]:
    """Write a rank's files below `folder`, read them back and sync them to the disk.

    Returns:
        Each file that was written, by its name below the folder.
    Raises:
        OSError: the folder cannot be written, or the disk is full.
        CheckFailed: the tensors read back differ from those in memory, or every lora_B is still zero after training.
    """
    (folder / OPTIMIZER).mkdir(parents=True, exist_ok=True)
    shard = folder / OPTIMIZER / shard_name(snapshot.rank, snapshot.world_size)
    own = write_shard(shard, snapshot.pieces, snapshot.generators)
    check_same(shard, own)
    files = [shard]
    if snapshot.first is not None:
        files += _write_first(snapshot.first, snapshot.position, folder)
    for path in files:
        sync(path)
    for parent in {path.parent for path in files}:  # a new file's directory entry needs its own sync
        sync(parent)
    return {str(path.relative_to(folder)): Written(path.stat().st_size, sha256(path)) for path in files}


def _write_first(first: OfFirstRank, position: Position, folder: Path) -> list[Path]:
    files = [] if first.adapter is None else _write_adapter(first.adapter, position, folder)
    for name, content in first.beside.items():
        (folder / ADAPTER / name).write_bytes(content)
        files.append(folder / ADAPTER / name)
    write_position(folder, position, first.owner, trains_all=first.adapter is None)
    files.append(folder / TRAINER)
    table, identity = first.reference
    if table:
        write_table(folder / REFERENCE_TABLE, table, identity)
        files.append(folder / REFERENCE_TABLE)
    return files


def _write_adapter(adapter: Mapping[str, Tensor], position: Position, folder: Path) -> list[Path]:
    weights = folder / ADAPTER_WEIGHTS
    weights.parent.mkdir(exist_ok=True)
    save_tensors(weights, adapter, {"format": "pt"})
    check_same(weights, adapter)
    is_b = {name: bool(tensor.any()) for name, tensor in adapter.items() if "lora_B" in name}
    if position.state.updates > 0 and not any(is_b.values()):
        raise CheckFailed(f"{weights}: every lora_B is zero after training: these adapters were never updated")
    return [weights]
