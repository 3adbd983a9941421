"""Reward models as adapters with a head, as a checkpoint holds them, and their rewards by Hugging Face alone."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from runs import recipe_in, write_rows
from safetensors.torch import save_file
from tiny import VOCAB_SIZE
from transformers import AutoModelForSequenceClassification

from uft_ds.streams.adapters import adapter_config_of, adapter_tensors, add_adapters
from uft_ds.streams.load import load_base

Conversation = tuple[tuple[int, ...], tuple[int, ...]]
"""Tokens of a prompt and of its answer."""


def saved_reward_adapter(
    base: Path,
    folder: Path,
    *,
    rank: int = 3,
    alpha: float = 9.0,
    targets: Any = ("q_proj", "down_proj"),
    seed: int = 7,
) -> Path:
    """An adapter with a head, both drawn. By default of another rank, scale and layers than `toy_model`'s policy."""
    loaded = load_base(str(base), revision=None, dtype=torch.float32, attention="auto", gradient_checkpointing=False)
    given = targets if isinstance(targets, str) else list(targets)
    policy: Any = add_adapters(loaded, rank=rank, alpha=alpha, targets=given, dtype=torch.float32, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    trained = {"scores.reward.weight": torch.randn(1, loaded.config.get_text_config().hidden_size, generator=generator)}
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad:
            drawn = torch.randn(parameter.shape, generator=generator) * 0.05
            trained[f"policy.{name}"] = drawn if "lora_B" in name else parameter.detach()
    folder.mkdir(parents=True)
    tensors = {name: tensor.contiguous() for name, tensor in adapter_tensors(policy, trained).items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_bytes(adapter_config_of(policy, with_head=True))
    return folder


def conversations(groups: int = 5, answers: int = 3, *, seed: int = 3) -> list[Conversation]:
    """Prompts of uneven lengths, each with several answers of uneven lengths."""
    rng = np.random.default_rng(seed)

    def tokens(low: int, high: int) -> tuple[int, ...]:
        return tuple(rng.integers(3, VOCAB_SIZE, size=int(rng.integers(low, high))).tolist())

    made: list[Conversation] = []
    for _ in range(groups):
        prompt = tokens(4, 20)
        made += [(prompt, (*tokens(1, 15), 2)) for _ in range(answers)]
    return made


def rewards_by_peft(base: Path, adapter: Path, given: Seq[Conversation]) -> torch.Tensor:
    """[answers]: by transformers' classifier and PEFT's own loading, each conversation alone."""
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    model = PeftModel.from_pretrained(plain, str(adapter)).eval()
    return rewards_by(model, given)


def rewards_by(model: Any, given: Seq[Conversation]) -> torch.Tensor:
    """[answers]: a classifier's output for each conversation alone, read at its last token."""
    model.config.pad_token_id = None  # the last token of a row, which has no padding
    with torch.no_grad():
        rows = [torch.tensor([[*prompt, *answer]]) for prompt, answer in given]
        return torch.stack([model(input_ids=row).logits[0, 0].float() for row in rows])


def online_recipe(folder: Path, base: Path, reward: Path, **changes: Any) -> Path:
    """Six steps of two prompts with four answers each, which the reward model in `reward` scores."""
    folder.mkdir(parents=True, exist_ok=True)
    prompts = [{"prompt": f"Say {number}"} for number in range(16)]
    source = {
        "format": "prompts",
        "path": str(write_rows(folder / "prompts.jsonl", prompts)),
        "answers": 4,
        "score_by": {"by": f"reward:{reward}", "map": "sigmoid"},
    }
    values: dict[str, Any] = {
        "data__sources": [source],
        "generator": {"by": "builtin", "max_new_tokens": 8},
        "objective__reward_shift": "none",
    }
    return recipe_in(folder, base, **(values | changes))
