"""From summed statistics to the metrics of a step, and their file."""

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
    """The objective's value, each kind's losses, and the health of its responses.

    Args:
        loss: the objective's value, summed over ranks and micro-batches.
        sums: [2, kinds, losses], summed over ranks and micro-batches: of each loss's terms the sum, and the number.
        rows: of all ranks' responses.
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
    """Peak memory of this process, GiB: of the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def model_flops_utilization(model: nn.Module, tokens_per_second: float, *, reference_share: float) -> float | None:
    """Model FLOPs over the GPU's peak; None without a GPU whose peak is known.

    Counted: 4 FLOPs a frozen parameter and token (forward, gradient of the activations) and 2 for the share of
    responses whose reference was forwarded; not counted: attention, the recomputation of checkpointed layers.
    """
    if not torch.cuda.is_available():
        return None
    peak = peak_flops(torch.cuda.get_device_name())
    if peak is None:
        return None
    num_parameters = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    return (4 + 2 * reference_share) * num_parameters * tokens_per_second / peak


class MetricsWriter:
    """Appends to metrics.jsonl and to the trackers; a line is whole or absent.

    Args:
        after_step: what trackers hold of later steps is of a run that was cut off, and is written again.
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
            # Its own step only rises, and it drops lines of steps that it has seen: those that a resume makes again.
            self._wandb.define_metric("step")
            self._wandb.define_metric("*", step_metric="step")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line, flushed: whoever follows the file sees it at once. JSON knows no NaN: it becomes null."""
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
        """Of metrics.jsonl so far, all of which is on the disk now: a checkpoint counts on it."""
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def _wandb_id(folder: Path, generate: Callable[[], str]) -> str:
    """The same for a run that goes on: one curve."""
    path = folder / "wandb-id"
    if not path.exists():
        write_atomically(path, generate())
    return path.read_text(encoding="utf-8")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, none where there is no file; one that a killed run left torn is left out."""
    if not path.exists():
        return []
    *lines, torn = path.read_text(encoding="utf-8").split("\n")
    del torn  # what follows the last line break: nothing, in a whole file
    return [json.loads(line) for line in lines]
