"""Offload of saved activations: they wait for the backward pass in host memory instead of GPU memory."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

Packed = tuple[torch.device, Tensor] | Tensor
"""An offloaded tensor with its original device, or a tensor that was left where it is."""


def activations_on_host() -> AbstractContextManager[None]:
    """Within the block, tensors that autograd saves are copied to host memory, and back when the backward needs them.

    With gradient checkpointing these are the layers' inputs, [1, tokens, hidden] each. Weights are left where they are:
    under ZeRO-3 the hooks see the gathered weights, and would keep the whole model in host memory.
    """
    return torch.autograd.graph.saved_tensors_hooks(_to_host, _to_device)


def _to_host(tensor: Tensor) -> Packed:
    if isinstance(tensor, nn.Parameter) or hasattr(tensor, "ds_id") or not tensor.is_floating_point():
        return tensor
    # The copy runs in the stream of the computation, so it is ordered before any reuse of the tensor's memory. The
    # price is that later kernels wait for it.
    host = torch.empty(tensor.size(), dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    host.copy_(tensor, non_blocking=True)
    return tensor.device, host


def _to_device(packed: Packed) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    device, host = packed
    return host.to(device, non_blocking=True)
