"""The optimiser's state as pieces of named parameters, whatever ZeRO's stage and the number of ranks.

A rank holds a run of each flattened trainable parameter (stage 3), or of some of them (stage 2): its float32
master weights and AdamW's two moments. Nothing is gathered to save them, and what one set of ranks has written another
may read: a piece says which part of which parameter it is.
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
"""(parameter's name, key, start, number of elements) -> float32, [elements]."""


@dataclass(frozen=True)
class Piece:
    """A run of a flattened parameter, as this rank holds it.

    shape: of the whole parameter. start: of the run within it. tensors: by key, [elements] each, float32: views of the
    live state, or copies in host memory.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    tensors: Mapping[str, Tensor]

    @property
    def numel(self) -> int:
        return self.tensors[MASTER].numel()


def pieces_of(engine: Any) -> list[Piece]:
    """What this rank holds of a DeepSpeed engine's trainable parameters."""
    return [
        Piece(
            name, shape, start, {MASTER: flat.detach().narrow(0, offset, numel)} | _moments(engine, flat, offset, numel)
        )
        for name, shape, start, flat, offset, numel in _places(engine)
    ]


def shapes_of(engine: Any) -> dict[str, tuple[int, ...]]:
    """Of the trainable parameters, whole, by name."""
    return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in _trainable(engine)}


def restore(engine: Any, read: Read, *, updates: int) -> None:
    """Put a saved state into a fresh engine: masters, moments, AdamW's count, and the weights that are forwarded.

    Every rank must call it.
    """
    engine.empty_partition_cache()
    for piece in pieces_of(engine):
        for key, tensor in piece.tensors.items():
            tensor.copy_(read(piece.name, key, piece.start, piece.numel))
    for *_, flat, _, _ in _places(engine):
        _state_of(engine, flat)["step"].fill_(float(updates))
    optimizer = engine.optimizer
    if _is_stage_3(engine):
        # As after a step: the shards that are forwarded are the masters in the adapters' own type.
        for group in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        optimizer.invalidate_secondary_tensor()  # hpZ's copies inside a node: of the weights before
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
    """(name, shape, start, flat partition, offset in it, number of elements) of each of this rank's pieces."""
    optimizer = engine.optimizer
    for name, parameter in _trainable(engine):
        p: Any = parameter
        if _is_stage_3(engine):
            assert not optimizer.swap_optimizer, "state on NVMe: `check_zero_section` refuses it"
            group, offset, padded = optimizer.grad_position[optimizer.get_param_id(p)]
            start = optimizer._get_param_partition_rank(p) * padded
            numel = min(padded, p.ds_numel - start)
            if numel > 0:
                yield name, tuple(p.ds_shape), start, optimizer.fp32_partitioned_groups_flat[group], offset, numel
        elif p._hp_mapping is not None:  # None: another rank's
            here, there = p._hp_mapping.lp_fragment_address, p._hp_mapping.hp_fragment_address
            (flat,) = optimizer.optimizer.param_groups[p._hp_mapping.param_group_index]["params"]
            yield name, tuple(p.shape), here.start, flat, there.start, there.numel


def _moments(engine: Any, flat: Tensor, offset: int, numel: int) -> dict[str, Tensor]:
    state = _state_of(engine, flat)
    return {key: state[key].narrow(0, offset, numel) for key in MOMENTS}


def _state_of(engine: Any, flat: Tensor) -> dict[str, Tensor]:
    """AdamW's own, which it makes at its first step only."""
    state: dict[str, Tensor] = engine.optimizer.optimizer.state[flat]
    if not state:
        state["step"] = torch.tensor(0.0)
        state |= {key: torch.zeros_like(flat, memory_format=torch.preserve_format).detach() for key in MOMENTS}
    return state
