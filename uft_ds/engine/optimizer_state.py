"""The optimiser's state as pieces of named parameters, for any ZeRO stage and any number of ranks.

A rank holds a contiguous range of each flattened trainable parameter (stage 3) or of some of them (stage 2): float32
master weights and AdamW's two moments. Nothing is gathered to save them. A piece records which range of which parameter
it is, so another number of ranks or another stage can read the pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")
KEYS = (MASTER, *MOMENTS)

Read = Callable[[str, str, int, int], Tensor]
"""Reads a range of a saved tensor: (parameter's name, key, start, number of elements) -> [elements], float32."""


@dataclass(frozen=True)
class Piece:
    """A contiguous range of a flattened parameter, as this rank holds it.

    shape: of the whole parameter. start: first element of the range. tensors: by key, [elements] each, float32; views
    of the live state, or copies in host memory.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    tensors: Mapping[str, Tensor]

    @property
    def numel(self) -> int:
        """The number of elements of the range."""
        return self.tensors[MASTER].numel()


def pieces_of(engine: Any) -> list[Piece]:
    """The pieces of a DeepSpeed engine's trainable parameters that this rank holds."""
    return [
        Piece(
            name, shape, start, {MASTER: flat.detach().narrow(0, offset, numel)} | _moments(engine, flat, offset, numel)
        )
        for name, shape, start, flat, offset, numel in _places(engine)
    ]


def shapes_of(engine: Any) -> dict[str, tuple[int, ...]]:
    """The whole shapes of the trainable parameters, by name."""
    return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in _trainable(engine)}


def restore(engine: Any, read: Read, *, updates: int) -> None:
    """Load a saved state into a fresh engine: master weights, moments, AdamW's step count, and the forwarded weights.

    Every rank must call it.

    Args:
        updates: the number of updates that the saved state has seen.
    """
    engine.empty_partition_cache()  # nothing may stay gathered or in flight while the shards change
    for piece in pieces_of(engine):
        for key, tensor in piece.tensors.items():
            tensor.copy_(read(piece.name, key, piece.start, piece.numel))
    for *_, flat, _, _ in _places(engine):
        _state_of(engine, flat)["step"].fill_(float(updates))
    optimizer = engine.optimizer
    if _is_stage_3(engine):
        # Like DeepSpeed's own step: the forwarded shards are the master weights cast to the adapters' dtype.
        for group in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        # hpZ's copies inside a node still hold the weights from before; a write to the shards does not refresh them.
        optimizer.invalidate_secondary_tensor()
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
    else:
        for name, parameter in _trainable(engine):
            whole = read(name, MASTER, 0, parameter.numel())
            parameter.data.copy_(whole.view_as(parameter))


def _is_stage_3(engine: Any) -> bool:
    return bool(engine.zero_optimization_stage() == 3)


def _trainable(engine: Any) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in engine.module.named_parameters() if p.requires_grad)


def _places(engine: Any) -> Iterator[tuple[str, tuple[int, ...], int, Tensor, int, int]]:
    """Each of this rank's pieces: (name, shape, start, flat partition, offset in it, number of elements)."""
    optimizer = engine.optimizer
    for name, parameter in _trainable(engine):
        p: Any = parameter
        if _is_stage_3(engine):
            assert not optimizer.swap_optimizer, "state on NVMe: `check_zero_section` refuses it"
            group, offset, padded = optimizer.grad_position[optimizer.get_param_id(p)]
            start = optimizer._get_param_partition_rank(p) * padded
            numel = min(padded, p.ds_numel - start)  # the last partitions of a parameter may be padding
            if numel > 0:
                yield name, tuple(p.ds_shape), start, optimizer.fp32_partitioned_groups_flat[group], offset, numel
        elif p._hp_mapping is not None:  # None: another rank holds this parameter
            here, there = p._hp_mapping.lp_fragment_address, p._hp_mapping.hp_fragment_address
            (flat,) = optimizer.optimizer.param_groups[p._hp_mapping.param_group_index]["params"]
            yield name, tuple(p.shape), here.start, flat, there.start, there.numel


def _moments(engine: Any, flat: Tensor, offset: int, numel: int) -> dict[str, Tensor]:
    state = _state_of(engine, flat)
    return {key: state[key].narrow(0, offset, numel) for key in MOMENTS}


def _state_of(engine: Any, flat: Tensor) -> dict[str, Tensor]:
    """AdamW's state of a flat partition. AdamW creates it at its first step; before that it is created here."""
    state: dict[str, Tensor] = engine.optimizer.optimizer.state[flat]
    if not state:
        state["step"] = torch.zeros((), device=flat.device)  # a fused AdamW counts on the device
        state |= {key: torch.zeros_like(flat, memory_format=torch.preserve_format).detach() for key in MOMENTS}
    return state
