"""The metrics of a step, computed from summed statistics, and the file and trackers that they are written to."""

from __future__ import annotations

import json
import math
import os
import resource
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from uft_ds.data.example import KINDS
from uft_ds.host.files import write_atomically
from uft_ds.host.gpus import peak_flops
from uft_ds.objectives.losses import LOSSES
from uft_ds.objectives.objective import Objective
from uft_ds.record.telemetry import health


def step_metrics(objective: Objective, loss: float, sums: Tensor, rows: np.ndarray) -> dict[str, float]:
    """The value of the objective, each kind's losses, and the health metrics of its responses.

    Args:
        loss: the value of the objective, summed over ranks and micro-batches.
        sums: [2, kinds, losses], summed over ranks and micro-batches: the sum and the number of each loss's terms.
        rows: the table of all ranks' responses.
    """
    metrics = {"loss": loss}
    totals, numbers = sums.tolist()
    for code, kind in enumerate(KINDS):
        of = objective.of_kind[kind]
        means = {
            name: totals[code][column] / numbers[code][column]
            for column, name in enumerate(LOSSES)
            if numbers[code][column]
        }
        if means:
            metrics[f"loss/{kind}"] = sum(of.losses[name] * mean for name, mean in means.items())
        if len(means) > 1:
            metrics |= {f"loss/{kind}/{name}": mean for name, mean in means.items()}
    return metrics | health(rows, objective)


def peak_memory_gib() -> float:
    """Peak memory of this process, GiB: GPU memory if there is a GPU, else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # in KiB on Linux


def model_flops_utilization(model: nn.Module, tokens_per_second: float, *, reference_share: float) -> float | None:
    """Model FLOPs per second divided by the GPU's peak; None without a GPU whose peak is known.

    Each parameter and token counts 4 FLOPs (forward, and gradient of the activations), and 2 more for the share of
    responses whose reference was forwarded. Attention and the recomputation of checkpointed layers are not counted.

    Args:
        tokens_per_second: of one GPU.
    """
    if not torch.cuda.is_available():
        return None
    peak = peak_flops(torch.cuda.get_device_name())
    if peak is None:
        return None
    # Under ZeRO-3 a partitioned parameter is empty; DeepSpeed keeps its whole size in `ds_numel`.
    num_parameters = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    return (4 + 2 * reference_share) * num_parameters * tokens_per_second / peak


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
                id=_wandb_id(folder, wandb.util.generate_id),
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


def _wandb_id(folder: Path, generate: Callable[[], str]) -> str:
    """The run's id in wandb, kept in the run's folder so that a resumed run continues the same curve."""
    path = folder / "wandb-id"
    if not path.exists():
        write_atomically(path, generate())
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
    if not path.exists():
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
