"""Putting a fresh engine where a checkpoint's stood."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from uft_ds.checkpoint.folder import OPTIMIZER
from uft_ds.checkpoint.generators import NAMES, restore_generators
from uft_ds.checkpoint.shards import Shards
from uft_ds.checkpoint.state import TrainerState
from uft_ds.engine.engine import Engine
from uft_ds.engine.optimizer_state import restore, shapes_of
from uft_ds.errors import UserError
from uft_ds.known.cache import REFERENCE_TABLE
from uft_ds.known.store import LogpTable, read_table
from uft_ds.record.report import Speaker


def restore_engine(engine: Engine, checkpoint: Path, state: TrainerState, reporter: Speaker) -> None:
    """Weights, optimiser, and where as many ranks saved as there are now, their random generators.

    Every rank must call it; each reads its own part.

    Raises:
        UserError: the checkpoint is of other parameters; names one.
    """
    shards = Shards(checkpoint / OPTIMIZER)
    _check_same_parameters(checkpoint, shards.shapes, shapes_of(engine.deepspeed))
    restore(engine.deepspeed, shards.read, updates=state.updates)
    if shards.world_size == engine.world_size:
        restore_generators(shards.own(engine.rank, NAMES))
    else:
        reporter.say(
            f"{checkpoint.name} was saved by {shards.world_size} ranks, now there are {engine.world_size}: the same "
            "data in the same order, losses equal to rounding"
        )


def stored_reference(checkpoint: Path, identity: str) -> LogpTable:
    """What the run knew of the reference.

    Raises:
        UserError: it is of another reference, or cannot be read.
    """
    path = checkpoint / REFERENCE_TABLE
    if not path.exists():
        return {}
    try:
        return read_table(path, identity)
    except ValueError as error:
        raise UserError(str(error)) from None


def _check_same_parameters(
    checkpoint: Path, theirs: Mapping[str, tuple[int, ...]], ours: Mapping[str, tuple[int, ...]]
) -> None:
    for name in sorted(set(theirs) | set(ours)):
        if theirs.get(name) != ours.get(name):
            raise UserError(
                f"{checkpoint}: {name} has shape {list(theirs.get(name, ()))} there, {list(ours.get(name, ()))} here: "
                "the checkpoint is of another model"
            )
