"""Write a toy model with random weights, its tokenizer, data and recipe, for a complete run within seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_SPECIAL = ("<|im_start|>", "<|im_end|>")
_VOCAB = 256 + len(_SPECIAL)
_MAX_LENGTH = 128


def write_toy(folder: Path, *, has_gpus: bool) -> Path:
    """Write model, data and recipe into an empty folder.

    Returns:
        Path of the recipe: one step of UFT on instruction and scored rows. The run writes only into the folder.
    """
    _write_tokenizer(folder / "model")
    config = Qwen2Config(
        vocab_size=_VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=_MAX_LENGTH,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Qwen2ForCausalLM(config).save_pretrained(folder / "model")
    instruction = [{"prompt": f"Name a number after {i}.", "response": str(i + 1)} for i in range(8)]
    scored = [{"prompt": f"Name a number after {i}.", "response": str(2 * i), "score": i / 7} for i in range(8)]
    tree: dict[str, Any] = {
        "name": "doctor",
        "model": {"base": str(folder / "model"), "dtype": "bfloat16" if has_gpus else "float32"},
        "lora": {"rank": 4, "alpha": 8.0},
        "data": {
            "max_length": _MAX_LENGTH,
            "cache_dir": str(folder / "tokenized"),
            "sources": [
                {"format": "jsonl", "path": str(_write_rows(folder / "instruction.jsonl", instruction))},
                {"format": "jsonl", "path": str(_write_rows(folder / "scored.jsonl", scored))},
            ],
        },
        "reference": {"cache_dir": str(folder / "reference")},
        "train": {"examples_per_step": 8, "tokens_per_micro_batch": 256, "steps": 1, "lr": 1e-3, "warmup": 0.0},
        "deepspeed": "zero3" if has_gpus else "zero3_cpu",
        "output": str(folder / "run"),
    }
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return recipe


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _write_tokenizer(folder: Path) -> None:
    """Write a byte-level tokenizer: two special tokens, then the 256 bytes, without merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*_SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIAL])
    start, end = _SPECIAL
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=start, eos_token=end, pad_token=end, model_max_length=_MAX_LENGTH
    )
    wrapped.chat_template = _TEMPLATE
    wrapped.save_pretrained(folder)
