"""This rank's reduced gradient, where DeepSpeed's ZeRO optimisers keep it between the last backward and the step.

Only this module knows where that is: it reads private attributes of deepspeed 0.19.8, and `tests/distributed/
test_agreement.py` fails where a release keeps the gradient elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def squared_norm(optimizer: Any) -> Tensor:
    """The sum of squares of this rank's part of the gradient, float64, a scalar on the device that holds the gradient.

    The parts of all ranks make up the whole gradient, each number once. The sum is not finite if any number of the part
    is not, or if a float32 sum of squares overflows: then a clipped step would be wrong, too.

    Args:
        optimizer: DeepSpeed's, at ZeRO stage 2 or 3, after the last backward of a step.
    """
    parts = _parts(optimizer)
    if not parts:
        return torch.zeros((), dtype=torch.float64)
    # Of a list at once: on a GPU a few kernels, where a model has hundreds of adapters.
    return torch.stack(torch._foreach_norm(parts)).double().square().sum()


def drop(optimizer: Any) -> None:
    """Forget the gradient: the optimiser stands as after a step, and nothing of this gradient is in the next one.

    Args:
        optimizer: as in `squared_norm`.
    """
    # DeepSpeed copies the next step's first gradient over these buffers. They are cleared as well, so that a parameter
    # without a gradient in that step keeps no NaN of this one.
    for part in _parts(optimizer):
        part.zero_()
    optimizer.zero_grad(set_to_none=True)
    if _is_offloaded(optimizer):
        optimizer.reset_cpu_buffers()
    if _is_stage_3(optimizer):
        return  # its `zero_grad` counts micro-steps from zero again
    optimizer.micro_step_id = -1
    if _is_offloaded(optimizer):
        optimizer._offload_accumulated_param_ids = set()
    for group in optimizer.averaged_gradients:
        optimizer.averaged_gradients[group] = None
        optimizer.all_grad_tensors[group] = None


def _parts(optimizer: Any) -> list[Tensor]:
    if not _is_offloaded(optimizer):
        groups = optimizer.averaged_gradients.values()
        return [part for group in groups if group is not None for part in group if part is not None]
    if _is_stage_3(optimizer):
        masters = optimizer.fp32_partitioned_groups_flat
    else:
        optimizer._wait_for_offload_copies()
        masters = optimizer.single_partition_of_fp32_groups
    return [master.grad for master in masters if master.grad is not None]


def _is_stage_3(optimizer: Any) -> bool:
    return hasattr(optimizer, "fp32_partitioned_groups_flat")


def _is_offloaded(optimizer: Any) -> bool:
    return bool(optimizer.offload_optimizer if _is_stage_3(optimizer) else optimizer.cpu_offload)
