"""What the benchmark of plans measures: models of a few sizes, the cells of its grid, and the bytes of each.

Not a benchmark itself: a part of benchmarks/plan.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tiny import VOCAB_SIZE

from uft_ds.engine.deepspeed_file import read_deepspeed_file
from uft_ds.objectives.reference import POLICY_STREAM
from uft_ds.planning.structure import Lora
from uft_ds.streams.load import check_base
from uft_ds.streams.stream import REWARD

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
