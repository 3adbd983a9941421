"""Restore a new engine from a checkpoint that `writer.py` wrote."""

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
from uft_ds.known.store import LogpTable, OtherReference, read_table
from uft_ds.record.report import Speaker


def restore_engine(engine: Engine, checkpoint: Path, state: TrainerState, reporter: Speaker) -> None:
    """Restore weights and optimiser state; also the random generators if the number of ranks is the same.

    Every rank must call it; each rank reads its own part.

    Raises:
        UserError: the checkpoint has other parameters than the engine; names one.
    """
    shards = Shards(checkpoint / OPTIMIZER)
    _check_same_parameters(checkpoint, shards.shapes, shapes_of(engine.deepspeed))
    restore(engine.deepspeed, shards.read, updates=state.updates)
    if shards.world_size == engine.world_size:
        restore_generators(shards.own(engine.rank, NAMES))
    else:
        reporter.say(
            f"{checkpoint.name} was saved by {shards.world_size} ranks, now there are {engine.world_size}: data and "
            "order are the same, losses agree to rounding"
        )


def stored_reference(checkpoint: Path, identity: str, by_others: Mapping[str, str]) -> LogpTable | str:
    """The reference log-probs that the run had stored in its checkpoint; empty if it had none.

    Args:
        by_others: names, by identity, of what the same reference may have been computed by instead.
    Returns:
        the table, or the name in `by_others` of what computed it.
    Raises:
        UserError: it belongs to another reference, or cannot be read.
    """
    path = checkpoint / REFERENCE_TABLE
    if not path.exists():
        return {}
    try:
        return read_table(path, identity)
    except ValueError as error:
        if isinstance(error, OtherReference) and error.identity in by_others:
            return by_others[error.identity]
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
