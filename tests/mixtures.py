"""Tiny mixtures of experts, saved as Hugging Face folders; their adapters are on the attention."""

from pathlib import Path

import torch
from models import ATTENTION, PACKED
from tiny import IM_END, IM_START, build_tiny_tokenizer
from transformers import AutoModelForCausalLM, GenerationConfig

MIXTURES = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")
TARGETS = ATTENTION


def build_mixture(folder: Path, family: str) -> Path:
    """A random float32 model of four experts, of which a token passes two or four, and its tokenizer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(PACKED[family]).to(torch.float32)
    model.generation_config = GenerationConfig(bos_token_id=IM_START, eos_token_id=IM_END, pad_token_id=IM_END)
    model.save_pretrained(folder)
    return build_tiny_tokenizer(folder)
