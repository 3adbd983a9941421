"""Tiny mixtures of experts, saved as Hugging Face folders; their adapters are on the attention."""

from pathlib import Path
from typing import Any

import torch
from models import ATTENTION, PACKED
from tiny import IM_END, IM_START, build_tiny_tokenizer
from torch import Tensor
from toy import logps_by_name, toy_model, toy_step
from transformers import AutoModelForCausalLM, GenerationConfig

from uft_ds.data.micro_batch import micro_batch
from uft_ds.objectives.reference import HowForwarded

MIXTURES = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")
FAST = ("qwen2_moe",)
"""In `make test`: the one that has a shared expert besides; the others have a part of what it has."""
TARGETS = ATTENTION


def build_mixture(folder: Path, family: str) -> Path:
    """A random float32 model of four experts, of which a token passes two or four, and its tokenizer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(PACKED[family]).to(torch.float32)
    model.generation_config = GenerationConfig(bos_token_id=IM_START, eos_token_id=IM_END, pad_token_id=IM_END)
    model.save_pretrained(folder)
    return build_tiny_tokenizer(folder)


def outputs_and_gradients(folder: Path, mode: HowForwarded, **options: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Log-probs of policy and reference for the toy step, and gradients of the policy's, with adapters of `TARGETS`."""
    model = toy_model(folder, targets=TARGETS, reference_mode=mode, **options)
    logps = logps_by_name(model, micro_batch(toy_step().sequences))
    logps["policy"].sum().backward()
    return logps, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
