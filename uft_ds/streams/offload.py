"""Activations that wait for the backward pass, in host memory instead of the GPU's."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

Packed = tuple[torch.device, Tensor] | Tensor


def activations_on_host() -> AbstractContextManager[None]:
    """Within the block, what autograd saves goes to host memory, and comes back when the backward asks for it.

    With gradient checkpointing these are the layers' inputs, [1, tokens, hidden] each. Weights stay where they are:
    under ZeRO-3 the hooks see them gathered, and would keep the whole model.
    """
    return torch.autograd.graph.saved_tensors_hooks(_to_host, _to_device)


def _to_host(tensor: Tensor) -> Packed:
    if isinstance(tensor, nn.Parameter) or hasattr(tensor, "ds_id") or not tensor.is_floating_point():
        return tensor
    # In the computation's own stream: in order with the tensor's reuse, but the kernels after it wait for the copy.
    host = torch.empty(tensor.size(), dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    host.copy_(tensor, non_blocking=True)
    return tensor.device, host


def _to_device(packed: Packed) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    device, host = packed
    return host.to(device, non_blocking=True)
