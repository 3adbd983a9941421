"""What `uft plan` predicts against what DeepSpeed allocates and sends.

    python benchmarks/plan.py [--ranks 1 2 4] [--layers N ...]

Random Qwen2- and Llama-shaped models of three sizes, on real ranks over gloo, with gradient checkpointing and without,
under ZeRO-3 with bounds that make a tiny model gather as a large one has to. Measured, on rank 0:

    gathered, reduced     bytes of all-gathers (returned) and of reductions (taken in) at DeepSpeed's communication
                          backend, a micro-step, over whole steps after two that warm up
    of all ranks          those of all-gathers in which every rank takes part: with a second copy inside a node
                          (`zero_hpz_partition_size`, here 2 of 4 ranks), what crosses the slow link
    weights               the base's shards that the parameters hold, or those of a reference's own copy of it
    adapter + optimiser   shards of the adapters, tensors of AdamW's state, master weights that are no adapter's storage
    gradients             the buffer of accumulated gradients, and the bucket in which they wait
    saved                 storages that autograd keeps for a micro-batch's backward, through torch's hooks

Predicted by the functions that `uft plan` calls, from the config alone. Bars: bytes sent within 1%, held within 10%.
Exits with 1 where one is missed. Evaluation comes first, as in each run.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from ranks import run_on_ranks
from rich.console import Console
from rich.table import Table
from tiny import VOCAB_SIZE
from toy import UFT, forwarded, toy_base, toy_model, toy_sequences

from uft_ds.data.micro_batch import MicroBatch
from uft_ds.data.mixture import Step
from uft_ds.data.packing import Packing
from uft_ds.engine.deepspeed_file import deepspeed_config, read_deepspeed_file
from uft_ds.engine.engine import Engine, partitioned_loading, with_shards_on_host
from uft_ds.objectives.objective import count_terms, micro_batch_loss
from uft_ds.objectives.reference import POLICY_STREAM
from uft_ds.planning import parts
from uft_ds.planning.activations import activations_of
from uft_ds.planning.memory import head_saved_bytes
from uft_ds.planning.sharding import sharding_of
from uft_ds.planning.structure import ITEM_BYTES, Lora, Structure, structure_of
from uft_ds.streams.load import attention_implementation, check_base, decoder_layer_class
from uft_ds.streams.policy import base_of
from uft_ds.streams.stream import REWARD, logps_of

SENT_BAR, HELD_BAR = 0.01, 0.10
STEPS_BEFORE, STEPS = 2, 2
TOKENS_PER_MICRO_BATCH, SEQUENCES_PER_RANK = 560, 16
RANKS = (1, 2, 4)
REWARD_MODEL = "reward model"
TRAINS_ALL = "all parameters"
COPIED = "all parameters, a copy"
WITHOUT_REFERENCE = {REWARD_MODEL: REWARD.name, TRAINS_ALL: POLICY_STREAM}
"""Modes in which one stream is forwarded alone, and its name."""
LORA = Lora(rank=4, alpha=8.0, targets="all-linear", dtype="float32")  # as `toy_model` has it


@dataclass(frozen=True)
class Size:
    """A model; the bounds of ZeRO-3 that it is run with are in its layers."""

    family: str
    hidden: int
    layers: int
    vocabulary: int
    tied: bool = False
    """The head is the embedding."""


SIZES = {
    "small": Size("qwen2", 256, 4, 4096),
    "middle": Size("llama", 384, 6, 3001, tied=True),  # a vocabulary that no number of ranks divides
    "large": Size("qwen2", 512, 8, 8192),
}
MIXTURE = Size("qwen3_moe", 256, 4, 4096)
"""Eight experts, of which a token passes two; adapters on the attention, and on the experts too."""
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class Bytes:
    """Of one rank; the first four a micro-step."""

    gathered: float
    far: float
    """Gathered by all ranks together."""
    reduced: float
    exchanged: float
    """By ranks that share rows, round the attention: what a rank receives from others."""
    weights: int
    optimizer: int
    gradients: int
    saved: int


def write_model(folder: Path, size: Size) -> Path:
    """A random float32 model."""
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
    )

    classes: Any = {
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
    }
    config_class, model_class = classes[size.family]
    mixture = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": size.hidden // 2, "head_dim": 32}
    assert size.vocabulary >= VOCAB_SIZE
    torch.manual_seed(0)
    config = config_class(
        vocab_size=size.vocabulary, hidden_size=size.hidden, intermediate_size=3 * size.hidden,
        num_hidden_layers=size.layers, num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=4096,
        tie_word_embeddings=size.tied, **(mixture if size == MIXTURE else {}),
    )  # fmt: skip
    model_class(config).to(torch.float32).save_pretrained(folder)
    return folder


def zero3(cell: Cell) -> dict[str, Any]:
    """`zero3_cpu` with bounds in proportion to a layer, as `zero3`'s are to one of 32B's."""
    layer = sum(p.numel() for p in _one_layer(cell.folder).parameters())
    config = read_deepspeed_file("zero3_cpu")
    config["zero_optimization"] |= {
        "reduce_bucket_size": 1_000_000,
        "stage3_prefetch_bucket_size": int(1.1 * layer),
        "stage3_max_live_parameters": int(3.1 * layer),
        "stage3_max_reuse_distance": int(2.2 * layer),
        "zero_hpz_partition_size": cell.secondary,
    }
    return config


def _one_layer(folder: Path) -> Any:
    from uft_ds.streams.load import empty_base

    return empty_base(check_base(str(folder), None)).get_decoder().layers[0]


# ---- measured


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

    torch.distributed.all_to_all_single = exchanging
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
    with _saving(saved):
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
    parameters = list(engine.module.parameters())
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


@contextmanager
def _saving(sizes: dict[int, int]) -> Iterator[None]:
    def pack(tensor: Tensor) -> Tensor:
        if not hasattr(tensor, "ds_id"):  # a gathered weight
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield


# ---- predicted


def _exchanged(cell: Cell, structure: Structure, step: list[int], item_bytes: int) -> float:
    """Of a micro-step, on average."""
    size = cell.sequence_size
    passes = 2 + (cell.mode == "lockstep") + cell.gradient_checkpointing
    of = [
        parts.exchanged_bytes(structure, -(-tokens // size), item_bytes, ranks=size, passes=passes) for tokens in step
    ]
    return sum(of) / len(of)


def predict(cell: Cell, ranks: int, batch: MicroBatch, step: list[int]) -> Bytes:
    """By the functions of `uft plan`; of the micro-batch only its numbers of tokens are read."""
    is_reward_model = cell.mode == REWARD_MODEL
    lora = replace(LORA, has_reward_head=is_reward_model, targets=cell.targets, experts=cell.experts)
    if cell.mode in (TRAINS_ALL, COPIED):
        lora = Lora.none(cell.dtype, copies_base=cell.mode == COPIED)
    structure = structure_of(check_base(str(cell.folder), None), lora, cell.quantization)
    item_bytes = structure.item_bytes(cell.dtype)
    sharding = sharding_of(zero3(cell))
    one = ITEM_BYTES[cell.dtype]
    in_lockstep = cell.mode == "lockstep"
    passes = 2 if cell.mode in ("separate", COPIED) else 1
    gathers = parts.micro_step_gathers(structure, item_bytes, sharding, passes=passes)
    activations = activations_of(
        structure, lengths=batch.lengths, dtype=cell.dtype, gradient_checkpointing=cell.gradient_checkpointing,
        lockstep=in_lockstep, attention=attention_implementation("auto", getattr(torch, cell.dtype), structure.config),
        under_zero3=True,
    )  # fmt: skip
    micro_steps, size = len(step), cell.sequence_size
    far, near = parts.step_gathered_bytes(structure, item_bytes, gathers, sharding, ranks, micro_steps)
    second = parts.frozen_bytes(structure, item_bytes, cell.secondary) if cell.secondary > 1 else 0
    return Bytes(
        gathered=(far + near) / micro_steps,
        far=far / micro_steps,
        reduced=parts.reduced_bytes(structure, ranks),
        exchanged=_exchanged(cell, structure, step, one),
        weights=parts.weights_bytes(structure, item_bytes, ranks)
        + second
        + parts.copy_bytes(structure, item_bytes, ranks),
        optimizer=parts.adapter_bytes(structure, item_bytes, ranks) + parts.optimizer_bytes(structure, ranks),
        gradients=parts.gradient_bytes(structure, ranks) + parts.bucket_bytes(sharding, one),
        saved=activations.divided(size).saved_bytes
        + (
            0
            if is_reward_model
            else head_saved_bytes(len(batch.targets_N) // size, structure.config.hidden_size, item_bytes=one)
        ),
    )


# ---- the table and the bars

FIELDS = {
    "gathered": SENT_BAR,
    "far": SENT_BAR,
    "reduced": SENT_BAR,
    "exchanged": SENT_BAR,
    "weights": HELD_BAR,
    "optimizer": HELD_BAR,
    "gradients": HELD_BAR,
    "saved": HELD_BAR,
}


@dataclass(frozen=True)
class Row:
    name: str
    measured: Bytes
    predicted: Bytes

    def ratio(self, field: str) -> float:
        """Predicted over measured; 1 where both are nothing."""
        measured, predicted = getattr(self.measured, field), getattr(self.predicted, field)
        return 1.0 if measured == predicted == 0 else predicted / measured if measured else math.inf

    def missed(self) -> list[str]:
        return [field for field, bar in FIELDS.items() if not abs(self.ratio(field) - 1) <= bar]


@dataclass(frozen=True)
class Cell:
    """Of the grid. folder: of the model."""

    folder: Path
    gradient_checkpointing: bool
    mode: str = "lockstep"
    """Of the reference; or one of `WITHOUT_REFERENCE`."""
    secondary: int = 1
    """`zero_hpz_partition_size`; DeepSpeed takes one of them a process."""
    dtype: str = "float32"
    """Of base and activations; adapters are in float32."""
    sequence_size: int = 1
    """Number of ranks that share rows."""
    quantization: str | None = None
    """The recipe's `model.quantization`."""
    is_mixture: bool = False
    experts: bool = False
    """Whether its routed experts get adapters too."""

    @property
    def targets(self) -> Any:
        return list(ATTENTION) if self.is_mixture else LORA.targets


def compare(cells: list[Cell], ranks: int) -> list[Row]:
    """All cells in one set of processes: a start takes longer than a cell."""
    found = run_on_ranks(measure_all, ranks, cells, timeout_seconds=1800)
    return [
        Row(
            f"{cell.folder.name}, {ranks}, {'recomputed' if cell.gradient_checkpointing else 'kept'}"
            + ("" if cell.mode == "lockstep" else f", {cell.mode}")
            + ("" if cell.dtype == "float32" else f", {cell.dtype}")
            + ("" if cell.secondary == 1 else f", copies in {cell.secondary}")
            + ("" if cell.sequence_size == 1 else f", {cell.sequence_size} share rows")
            + ("" if cell.quantization is None else f", {cell.quantization}")
            + (", adapters of experts" if cell.experts else ""),
            measured,
            predict(cell, ranks, batch, step),
        )
        for cell, (measured, batch, step) in zip(cells, found[0], strict=True)
    ]


def measure_all(cells: list[Cell]) -> list[tuple[Bytes, MicroBatch, list[int]]]:
    """On one of the ranks."""
    return [measure(cell) for cell in cells]


def table(rows: list[Row]) -> Table:
    shown = Table(title="measured MB, and predicted / measured")
    shown.add_column("model, ranks, activations")
    for field in FIELDS:
        shown.add_column({"far": "of all ranks"}.get(field, field), justify="right")
    for row in rows:
        shown.add_row(row.name, *(f"{getattr(row.measured, f) / 1e6:.3f}  {row.ratio(f):.4f}" for f in FIELDS))
    return shown


def grid(folders: list[Path], modes: list[str]) -> list[Cell]:
    """Every model, with gradient checkpointing and without."""
    return [Cell(folder, recompute, mode) for folder in folders for mode in modes for recompute in (True, False)]


def of_mixture(folder: Path) -> list[Cell]:
    """A mixture of experts, below `folder`, whose experts are frozen and adapted."""
    model = write_model(folder / "mixture", MIXTURE)
    return [
        Cell(model, recompute, is_mixture=True, experts=experts)
        for experts in (False, True)
        for recompute in (True, False)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=list(RANKS))
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--modes", nargs="+", choices=["lockstep", "separate"], default=["lockstep"])
    options = parser.parse_args()
    console = Console(width=150, highlight=False)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        folders = [write_model(Path(name) / size, SIZES[size]) for size in options.sizes]
        for ranks in options.ranks:
            cells = grid(folders, options.modes)
            if ranks == 2:
                cells += [Cell(folders[0], recompute, dtype="bfloat16") for recompute in (True, False)]
                cells += [Cell(folders[0], recompute, sequence_size=2) for recompute in (True, False)]
                cells += [Cell(folder, True, mode) for mode in (TRAINS_ALL, COPIED) for folder in folders]
                cells += [Cell(folders[0], False, TRAINS_ALL, dtype="bfloat16")]
                cells += [Cell(folder, True, dtype="bfloat16", quantization="nf4") for folder in folders]
                cells += of_mixture(Path(name))
            found = compare(cells, ranks)
            if ranks == 4:  # in processes of its own: DeepSpeed makes such groups once
                found += compare([Cell(folders[0], gradient_checkpointing=True, secondary=2)], ranks)
            console.print(table(found))
            rows += found
    missed = [f"{row.name}: {field} {row.ratio(field):.4f}" for row in rows for field in row.missed()]
    console.print("every bar holds" if not missed else "MISSED: " + "; ".join(missed))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
