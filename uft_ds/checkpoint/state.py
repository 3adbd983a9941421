"""The trainer state of a checkpoint (trainer.json): all that a resume needs besides weights and optimiser state."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from uft_ds.checkpoint.owner import RUN, Owner, parsed_owner
from uft_ds.data.source import SourceState
from uft_ds.errors import UserError
from uft_ds.host.files import write_atomically
from uft_ds.host.formats import KEY, check_format

TRAINER = "trainer.json"
FORMAT = 1
TRAINS_ALL = "trains_all"
"""Key of trainer.json in checkpoints without an adapter, of runs that train all parameters."""


@dataclass(frozen=True)
class TrainerState:
    """All that a step depends on besides weights, optimiser and the recipe.

    log_ratio_shift: state of the reward shift, in nats: the running mean, or the last step's value.
    source: the state of the source of steps; empty for fixed data, whose order depends on the step number alone.
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
    """The trainer state, and the size in bytes of the metrics file at that step."""

    state: TrainerState
    metrics_bytes: int


def write_position(folder: Path, position: Position, owner: Owner | None = None, *, trains_all: bool = False) -> None:
    """Write trainer.json below `folder`.

    Args:
        owner: whose checkpoint it is; None where the run does not say.
        trains_all: whether all parameters are trained, so that the checkpoint has no adapter.
    """
    content: dict[str, Any] = {KEY: FORMAT, **asdict(position.state), "metrics_bytes": position.metrics_bytes}
    if trains_all:
        content[TRAINS_ALL] = True
    if owner is not None:
        content[RUN] = asdict(owner)
    write_atomically(folder / TRAINER, json.dumps(content, indent=2) + "\n")


def read_position(checkpoint: Path) -> Position:
    """Read a checkpoint's trainer.json.

    Raises:
        UserError: the file cannot be read, or has another format.
    """
    path = checkpoint / TRAINER
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        check_format(path, content.get(KEY), FORMAT, "start the run anew")
        state = TrainerState(
            int(content["step"]),
            int(content["skipped_steps"]),
            float(content["log_ratio_shift"]),
            dict(content.get("source", {})),  # absent where a run began before sources had a state
        )
        return Position(state, int(content["metrics_bytes"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not the state of a trainer ({type(error).__name__}: {error})") from None


def claims_of(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint's trainer.json states of it; nothing if it cannot be read, which `read_position` names."""
    try:
        content = json.loads((checkpoint / TRAINER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def has_adapter(claims: Mapping[str, Any]) -> bool:
    """Whether a checkpoint that states this is of a run that trains adapters; it is assumed where nothing is stated."""
    return claims.get(TRAINS_ALL) is not True


def step_and_owner(claims: Mapping[str, Any]) -> tuple[int, Owner | None]:
    """The step and the owner that are stated.

    Raises:
        ValueError: no step is stated, or the owner is something else.
    """
    if type(claims.get("step")) is not int:
        raise ValueError("states no step")
    return claims["step"], parsed_owner(claims.get(RUN))
