"""Where a run stands, besides its weights and its optimiser: trainer.json of a checkpoint."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from uft_ds.data.source import SourceState
from uft_ds.errors import UserError
from uft_ds.host.files import write_atomically
from uft_ds.host.formats import KEY, check_format

TRAINER = "trainer.json"
FORMAT = 1


@dataclass(frozen=True)
class TrainerState:
    """All that a step depends on besides weights, optimiser and the recipe.

    log_ratio_shift: what the reward shift goes on with, nats: its running mean, or the last step's value.
    source: the state of the source of steps; empty for fixed data, whose order is the step's number.
    """

    step: int
    skipped_steps: int
    log_ratio_shift: float = 0.0
    source: SourceState = field(default_factory=dict)

    @property
    def updates(self) -> int:
        """Steps that changed the weights."""
        return self.step - self.skipped_steps


@dataclass(frozen=True)
class Position:
    """A state, and how far the metrics file had been written: in bytes."""

    state: TrainerState
    metrics_bytes: int


def write_position(folder: Path, position: Position) -> None:
    """As trainer.json."""
    content = {KEY: FORMAT, **asdict(position.state), "metrics_bytes": position.metrics_bytes}
    write_atomically(folder / TRAINER, json.dumps(content, indent=2) + "\n")


def read_position(checkpoint: Path) -> Position:
    """What a checkpoint's trainer.json says.

    Raises:
        UserError: not such a file, or of another format.
    """
    path = checkpoint / TRAINER
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        check_format(path, content.get(KEY), FORMAT, "start the run anew")
        state = TrainerState(
            int(content["step"]),
            int(content["skipped_steps"]),
            float(content["log_ratio_shift"]),
            dict(content["source"]),
        )
        return Position(state, int(content["metrics_bytes"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not where a run stood ({type(error).__name__}: {error})") from None
