"""The metrics of a step, computed from summed statistics."""

from __future__ import annotations

import math
import resource

import numpy as np
import torch
from torch import Tensor, nn

from uft_ds.architectures.facts import active_share, is_passed_by_text
from uft_ds.data.example import KINDS
from uft_ds.host.gpus import peak_flops
from uft_ds.objectives.groups import Groups
from uft_ds.objectives.losses import LOSSES
from uft_ds.objectives.objective import Objective
from uft_ds.record.telemetry import health
from uft_ds.streams.nf4 import num_weights


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


def group_metrics(objective: Objective, groups: Groups, rows: np.ndarray) -> dict[str, float]:
    """How far a step's answers to one prompt differ; empty if no loss compares scores of answers with each other.

    Args:
        groups: of the step.
        rows: the table of all ranks' responses.
    """
    metrics: dict[str, float] = {}
    flat = [group.is_flat for group in groups.found if group.comparison != "shifted"]
    for code, kind in enumerate(KINDS):
        advantages = rows["advantage"][rows["kind"] == code]
        if not len(advantages):
            continue
        if objective.policy_gradient(kind) is not None:
            metrics[f"advantage/{kind}"] = float(np.abs(advantages).mean())
        elif objective.centers(kind):
            # Of a centred response it is made of scores alone, so it is NaN only where there is none.
            centered = advantages[~np.isnan(advantages)]
            metrics[f"centered/{kind}"] = len(centered) / len(advantages)
            metrics[f"advantage/{kind}"] = float(np.abs(centered).mean()) if len(centered) else math.nan
    if metrics:
        metrics["flat_groups"] = sum(flat) / len(flat) if flat else math.nan
    return metrics


def peak_memory_gib() -> float:
    """Peak memory of this process, GiB: GPU memory if there is a GPU, else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # in KiB on Linux


def model_flops_utilization(model: nn.Module, tokens_per_second: float, *, reference_share: float) -> float | None:
    """Model FLOPs per second divided by the GPU's peak; None without a GPU whose peak is known.

    Each parameter and token counts 4 FLOPs (forward, and gradient of the activations), 2 more where all parameters are
    trained, and 2 more for the share of responses whose reference was forwarded. Attention and the recomputation of
    checkpointed layers are not counted. Of a mixture's routed experts those count that a token passes, and of a base in
    NF4 its weights, not its bytes.

    Args:
        tokens_per_second: of one GPU.
    """
    if not torch.cuda.is_available():
        return None
    peak = peak_flops(torch.cuda.get_device_name())
    if peak is None:
        return None
    config = getattr(model, "config", None)
    num_parameters = sum(
        num_weights(p) * (1.0 if config is None else active_share(config, name))
        for name, p in model.named_parameters()
        if config is None or is_passed_by_text(config, name)
    )
    of_policy = 6 if all(parameter.requires_grad for parameter in model.parameters()) else 4
    return (of_policy + 2 * reference_share) * num_parameters * tokens_per_second / peak
