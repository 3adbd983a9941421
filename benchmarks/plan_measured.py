"""What DeepSpeed allocates and sends for a cell of the grid, on real ranks.

Not a benchmark itself: a part of benchmarks/plan.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from plan_cells import COPIED, REWARD_MODEL, TRAINS_ALL, WITHOUT_REFERENCE, Bytes, Cell, zero3
from reference_traffic import measuring_saved
from torch import Tensor
from toy import UFT, forwarded, toy_base, toy_model, toy_sequences

from uft_ds.data.micro_batch import MicroBatch
from uft_ds.data.mixture import Step
from uft_ds.data.packing import Packing
from uft_ds.engine.deepspeed_file import deepspeed_config
from uft_ds.engine.engine import Engine, partitioned_loading, with_shards_on_host
from uft_ds.objectives.objective import count_terms, micro_batch_loss
from uft_ds.objectives.reference import POLICY_STREAM
from uft_ds.streams.load import decoder_layer_class
from uft_ds.streams.policy import base_of
from uft_ds.streams.stream import REWARD, logps_of

STEPS_BEFORE, STEPS = 2, 2
TOKENS_PER_MICRO_BATCH, SEQUENCES_PER_RANK = 560, 16


@dataclass
class Sent:
    gathered: int = 0
    far: int = 0
    reduced: int = 0
    exchanged: int = 0


@contextmanager
def counting() -> Iterator[Sent]:
    """Count at DeepSpeed's communication backend: what all-gathers return, what reductions take in."""
    import deepspeed.comm.comm as comm

    sent, world_size = Sent(), torch.distributed.get_world_size()
    backend: Any = comm.cdb
    originals = {
        name: getattr(backend, name) for name in ("all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce")
    }

    def counted(name: str, argument: str, place: int, field: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            tensor: Tensor = kwargs[argument] if argument in kwargs else args[place]
            setattr(sent, field, getattr(sent, field) + tensor.nbytes)
            group = kwargs.get("group")
            if field == "gathered" and (group is None or torch.distributed.get_world_size(group) == world_size):
                sent.far += tensor.nbytes
            return originals[name](*args, **kwargs)

        return call

    backend.all_gather_into_tensor = counted("all_gather_into_tensor", "output_tensor", 0, "gathered")
    backend.reduce_scatter_tensor = counted("reduce_scatter_tensor", "input_tensor", 1, "reduced")
    backend.all_reduce = counted("all_reduce", "tensor", 0, "reduced")
    exchange = torch.distributed.all_to_all_single

    def exchanging(output: Tensor, given: Tensor, *, group: Any) -> None:
        ranks = torch.distributed.get_world_size(group)
        sent.exchanged += output.nbytes * (ranks - 1) // ranks
        exchange(output, given, group=group)

    torch.distributed.all_to_all_single = exchanging  # type: ignore[assignment]
    try:
        yield sent
    finally:
        torch.distributed.all_to_all_single = exchange
        for name, original in originals.items():
            setattr(backend, name, original)


def whole_step() -> Step:
    """Uneven sequences, for all ranks together."""
    return Step(0, toy_sequences(SEQUENCES_PER_RANK * torch.distributed.get_world_size(), seed=100, longest=120))


def measure(cell: Cell) -> tuple[Bytes, MicroBatch, list[int]]:
    """On one of the ranks; the micro-batch whose activations were measured; and the tokens of each of a step."""
    dtype = getattr(torch, cell.dtype)
    config = deepspeed_config(zero3(cell), dtype=dtype, max_grad_norm=1e6)
    is_reward_model, alone = cell.mode == REWARD_MODEL, WITHOUT_REFERENCE.get(cell.mode)
    mode: Any = "separate" if alone or cell.mode == COPIED else cell.mode
    with partitioned_loading(with_shards_on_host(config)):
        reference = toy_base(cell.folder, dtype=dtype) if cell.mode == COPIED else None
    with partitioned_loading(config):  # as a run loads; adapters then keep their own type
        model = toy_model(
            cell.folder,
            dtype=dtype,
            b_std=0.0,
            gradient_checkpointing=cell.gradient_checkpointing,
            reference_mode=mode,
            further=(REWARD,) if is_reward_model else (),
            trains_all=cell.mode in (TRAINS_ALL, COPIED),
            reference=reference,
            quantization=cell.quantization,
            targets=cell.targets,
            experts=cell.experts,
        )
    layer_class = decoder_layer_class(base_of(model.policy))
    packing = Packing(sequence_size=cell.sequence_size)
    engine = Engine(model, config, layer_class=layer_class, weight_decay=0.0, packing=packing)
    step = whole_step()
    terms = count_terms(UFT, step.responses)
    batches = engine.micro_batches(step, TOKENS_PER_MICRO_BATCH // cell.sequence_size)

    def said(batch: MicroBatch) -> dict[str, Tensor]:
        if alone is None:
            return forwarded(engine, batch)
        return logps_of(engine(batch, [engine.streams[alone]]), batch)

    def train() -> None:
        for number, batch in enumerate(batches, start=1):
            if alone is not None:
                loss = said(batch)[alone].square().sum()
            else:
                loss, _ = micro_batch_loss(UFT, batch, terms, said(batch))
            engine.backward(loss, is_last=number == len(batches))
        engine.step(1e-3)

    with engine.evaluating():
        for batch in batches[:2]:
            said(batch)
    for _ in range(STEPS_BEFORE):
        train()
    with counting() as sent:
        for _ in range(STEPS):
            train()
    micro_steps = STEPS * len(batches)
    held = resident(engine)
    saved: dict[int, int] = {}
    with measuring_saved(saved):
        logps_R = said(batches[0])[alone or POLICY_STREAM]
    engine.backward(logps_R.sum(), is_last=True)
    return (
        Bytes(
            sent.gathered / micro_steps,
            sent.far / micro_steps,
            sent.reduced / micro_steps,
            sent.exchanged / micro_steps,
            *held,
            sum(saved.values()),
        ),
        batches[0],
        [len(batch.token_ids_T) for batch in batches],
    )


def resident(engine: Engine) -> tuple[int, int, int]:
    """What DeepSpeed holds: base weights; adapters and optimiser; gradients. Each storage counted once."""
    zero: Any = engine.deepspeed.optimizer
    parameters: list[Any] = list(engine.module.parameters())  # with what DeepSpeed adds to them
    frozen = [p for p in parameters if not p.requires_grad]
    copies = [p.ds_secondary_tensor for p in frozen if p.ds_secondary_tensor is not None]
    weights = _bytes([*(p.ds_tensor for p in frozen), *copies, *constants_of(frozen)])
    state = [t for of in zero.optimizer.state.values() for t in of.values() if isinstance(t, Tensor)]
    adapters = [p.ds_tensor for p in parameters if p.requires_grad]
    optimizer = _bytes([*adapters, *zero.fp32_partitioned_groups_flat, *state])
    buckets = [bucket.buffer for bucket in zero.ipg_buckets.values()]
    return weights, optimizer, _bytes([zero.grad_partitions_flat_buffer, *buckets])


def constants_of(parameters: Iterable[Any]) -> Iterator[Tensor]:
    """What decodes the parameters that are in NF4, besides their codes."""
    states = [p.quant_state for p in parameters if hasattr(p, "quant_state")]
    for state in states:
        yield from (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)


def _bytes(tensors: Any) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
