"""Access to this rank's reduced gradient, which DeepSpeed's ZeRO optimisers keep from the last backward to the step.

Only this module knows where it is kept. It reads private attributes of deepspeed 0.19.8 and replaces two methods for a
step; `test_finite_agreement.py` and `test_optimizer_step.py` in tests/distributed fail with a release that differs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def squared_norm(optimizer: Any) -> Tensor:
    """The sum of squares of this rank's part of the gradient: a float64 scalar on the device that holds the gradient.

    The parts of all ranks together are the whole gradient, with each number once. The sum is not finite if a number of
    the part is not finite.

    Args:
        optimizer: DeepSpeed's, at ZeRO stage 2 or 3, after the last backward of a step.
    """
    parts = _parts(optimizer)
    if not parts:  # a norm of 0 would leave every step unclipped
        raise RuntimeError("DeepSpeed's optimiser holds no gradient where this release is expected to keep it")
    # One call for the whole list: on a GPU a few kernels instead of one for each of hundreds of adapters. In float64,
    # because torch 2.13's float32 norm of one tensor of 6e7 numbers is 0.5% too small on a CPU (an offloaded gradient).
    return torch.stack(torch._foreach_norm(parts, 2, dtype=torch.float64)).square().sum()


@contextmanager
def norm_given(optimizer: Any, norm: float) -> Iterator[None]:
    """Within the block, DeepSpeed's step clips by this norm instead of computing its own.

    Its own costs a collective for each group of parameters, one or two kernels for each parameter, and up to two waits
    for the device (one for each parameter of an offloaded optimiser).

    Args:
        optimizer: as in `squared_norm`.
        norm: of the whole gradient over all ranks, finite.
    """
    # On the host, where DeepSpeed's question whether it is finite waits for nothing; a kernel takes it as a number.
    given = torch.tensor(norm, dtype=torch.float64)
    replaced: dict[str, Any] = {"check_overflow": lambda partition_gradients=True: None}
    if _is_stage_3(optimizer):
        replaced["_get_norm_groups"] = lambda: [given]
    else:
        replaced["scaled_global_norm"] = lambda norm_type=2: given
    vars(optimizer).update(replaced)
    try:
        yield
    finally:
        for name in replaced:
            delattr(optimizer, name)


def drop(optimizer: Any) -> None:
    """Discard the gradient. The optimiser is then in the same state as after a step; the next step is not affected.

    Args:
        optimizer: as in `squared_norm`.
    """
    # DeepSpeed copies the next step's first gradient over these buffers. They are zeroed as well, because a parameter
    # without a gradient in that step would otherwise keep a NaN of this one.
    for part in _parts(optimizer):
        part.zero_()
    optimizer.zero_grad(set_to_none=True)
    if _is_offloaded(optimizer):
        optimizer.reset_cpu_buffers()
    if _is_stage_3(optimizer):
        return  # at stage 3 `zero_grad` has also reset the count of micro-steps
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
