"""The file of a run's metrics, a line a step, and the trackers beside it; reading it needs no torch."""

from __future__ import annotations

import json
import math
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from uft_ds.host.files import write_atomically


class MetricsWriter:
    """Appends to metrics.jsonl and to the trackers. A line is written completely or not at all.

    Args:
        after_step: the step that a run resumes from. Trackers may hold later steps of the interrupted run; these are
            written again.
    """

    def __init__(
        self,
        folder: Path,
        trackers: tuple[str, ...],
        *,
        run_name: str,
        config: Mapping[str, Any],
        after_step: int | None = None,
    ) -> None:
        self._file = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        self._tensorboard: Any = None
        self._wandb: Any = None
        if "tensorboard" in trackers:
            from torch.utils.tensorboard import SummaryWriter

            purge_step = None if after_step is None else after_step + 1
            self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=purge_step)
        if "wandb" in trackers:
            import wandb

            self._wandb = wandb.init(
                project="uft_ds",
                name=run_name,
                dir=str(folder),
                config=dict(config),
                id=_wandb_id(folder),
                resume="allow",
            )
            # wandb's own step can only increase, and it drops lines of earlier steps, such as those that a resumed run
            # repeats. So the step is logged as a metric.
            self._wandb.define_metric("step")
            self._wandb.define_metric("*", step_metric="step")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one line and flush it, so that a reader of the file sees it at once.

        A number that is not finite becomes null, because JSON has no NaN.
        """
        line = {"step": step} | {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        if self._tensorboard is not None:
            for name, value in metrics.items():
                self._tensorboard.add_scalar(name, value, step)
            self._tensorboard.flush()
        if self._wandb is not None:
            self._wandb.log({"step": step, **metrics})

    @property
    def num_bytes(self) -> int:
        """The current size of metrics.jsonl, after syncing it to the disk: a checkpoint records this size."""
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        """Close the file and the trackers."""
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def _wandb_id(folder: Path) -> str:
    """The run's id in wandb, kept in the run's folder so that a resumed run continues the same curve."""
    # Made here: wandb 0.31 has no `wandb.util.generate_id` any more.
    path = folder / "wandb-id"
    if not path.exists():
        write_atomically(path, uuid.uuid4().hex[:8])
    return path.read_text(encoding="utf-8")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; none if there is no file.

    An incomplete last line of a killed run is left out, and so are damaged lines, which `damaged_metrics` names.
    """
    return [line for line in _lines(path) if line is not None]


def damaged_metrics(path: Path) -> list[int]:
    """The numbers, from 1, of a metrics file's lines that no run has written so: after a disk or a copy has failed."""
    return [number for number, line in enumerate(_lines(path), start=1) if line is None]


def _lines(path: Path) -> list[dict[str, Any] | None]:
    """Each complete line; None for one that is not an object with a step and numbers."""
    if not path.is_file():
        return []
    *lines, torn = path.read_bytes().split(b"\n")
    del torn  # what follows the last line break, which is empty unless the last line is incomplete
    return [_parsed(line) for line in lines]


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or type(found.get("step")) is not int:
        return None
    is_number = (value is None or type(value) in (int, float) for value in found.values())
    return found if all(is_number) else None
