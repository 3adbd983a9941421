"""Weights that ZeRO-3 has partitioned, gathered for the time of a block."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def gathered(engine: Any, parameters: Seq[nn.Parameter]) -> Iterator[None]:
    """Within the block, every rank holds the given parameters whole. Every rank must enter it.

    Args:
        engine: DeepSpeed's.
    """
    import deepspeed

    # A forward without a backward leaves prefetched parameters in flight, which cannot be gathered again. The
    # optimiser's method is called, because the engine's also runs Python's garbage collector, which takes longer than
    # everything else here.
    if hasattr(engine.optimizer, "empty_partition_cache"):
        engine.optimizer.empty_partition_cache()
    with deepspeed.zero.GatheredParameters(parameters):
        yield


@contextmanager
def whole_parameter(parameter: nn.Parameter) -> Iterator[None]:
    """Within the block, every rank holds a parameter whole, before there is an engine. Every rank must enter it.

    A parameter that is not partitioned is whole anyway.
    """
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        yield


@contextmanager
def whole(engine: Any, module: nn.Module) -> Iterator[None]:
    """Within the block and under ZeRO-3, every rank holds all weights of a module, whose forwards have no collective.

    DeepSpeed's hooks are off: they would free each layer after its forward, and end the prefetch trace, which expects
    the modules in the order of a training step.

    Args:
        engine: DeepSpeed's. module: a part of its model, which alone may be forwarded.
    """
    offload = engine.optimizer.parameter_offload
    handles = [offload.fwd_pre_hook, *offload.forward_hooks, *offload.backward_hooks]
    with gathered(engine, list(module.parameters())), _without_hooks(engine.module, handles):
        yield


@contextmanager
def _without_hooks(module: nn.Module, handles: Iterable[Any]) -> Iterator[None]:
    """Within the block, the forward hooks of the given handles are not called. Other hooks are, in their order."""
    off = {handle.id for handle in handles}
    before = [(part, part._forward_pre_hooks, part._forward_hooks) for part in module.modules()]

    def others(hooks: Any) -> Any:
        return OrderedDict((number, hook) for number, hook in hooks.items() if number not in off)

    for part, pre_hooks, hooks in before:
        part._forward_pre_hooks, part._forward_hooks = others(pre_hooks), others(hooks)
    try:
        yield
    finally:
        # The same dictionaries: DeepSpeed's handles refer to them.
        for part, pre_hooks, hooks in before:
            part._forward_pre_hooks, part._forward_hooks = pre_hooks, hooks


def weight_bytes(module: nn.Module) -> int:
    """Memory of all weights of a model, adapters included, as if they were not partitioned."""
    # Of a partitioned parameter `numel()` is 0.
    return sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in module.parameters())
