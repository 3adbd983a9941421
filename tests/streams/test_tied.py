"""Two different tensors under a flag that says they are one: refused before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.gemma3 import Gemma3Config, Gemma3ForConditionalGeneration
from transformers.models.gpt2 import GPT2Config, GPT2LMHeadModel
from transformers.models.llama import LlamaConfig, LlamaForCausalLM

from uft_ds.errors import UserError
from uft_ds.streams.load import check_base_files, meta_model
from uft_ds.streams.stored_names import origins, read_parameter
from uft_ds.streams.weight_files import WeightFiles

SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
GEMMA3 = Gemma3Config(
    text_config=SIZES, vision_config=VISION, mm_tokens_per_image=1, boi_token_index=10, eoi_token_index=11,
    image_token_index=12,
)  # fmt: skip
TIED: dict[str, tuple[Any, Any, str]] = {
    "llama": (LlamaConfig(**SIZES, tie_word_embeddings=True), LlamaForCausalLM, "model.embed_tokens.weight"),
    "gpt2": (GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=4), GPT2LMHeadModel, "transformer.wte.weight"),
    "gemma3": (GEMMA3, Gemma3ForConditionalGeneration, "language_model.model.embed_tokens.weight"),
}
HEAD = {"gemma3": "language_model.lm_head.weight"}


def stored_with_a_head(kind: str, folder: Path, *, differs: bool) -> str:
    """A tied model whose file also holds the head; the head's name."""
    config, model_class, embedding = TIED[kind]
    torch.manual_seed(0)
    model_class(config).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    head = HEAD.get(kind, "lm_head.weight")
    assert head not in tensors
    tensors[head] = tensors[embedding] + (1 if differs else 0)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return head


@pytest.mark.parametrize("kind", TIED)
def test_a_head_that_differs_from_the_embedding_is_refused(tmp_path: Path, kind: str) -> None:
    """By both names and the flag; with equal values, or without the flag, the base is good."""
    head = stored_with_a_head(kind, tmp_path / "two", differs=True)
    with pytest.raises(UserError) as caught:
        check_base_files(tmp_path / "two")
    assert f"{head} and {TIED[kind][2]} differ" in str(caught.value)
    assert "tie_word_embeddings: false" in str(caught.value)
    stored_with_a_head(kind, tmp_path / "one", differs=False)
    check_base_files(tmp_path / "one")


def test_without_the_flag_two_tensors_are_two(tmp_path: Path) -> None:
    """What the message advises is accepted."""
    stored_with_a_head("llama", tmp_path, differs=True)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": False}))
    check_base_files(tmp_path)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3"])
def test_every_stored_tensor_has_its_place_in_memory(tmp_path: Path, kind: str) -> None:
    """By names in memory the files give what transformers loads, whatever their names in the files."""
    config, model_class, _ = TIED[kind]
    model_class(config).save_pretrained(tmp_path)
    weights = WeightFiles(tmp_path)
    model = meta_model(AutoConfig.from_pretrained(tmp_path))
    empty = {name: torch.empty(info.shape, dtype=info.dtype, device="meta") for name, info in weights.infos.items()}
    found = origins(model, empty)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    for name in set(loaded) - {"lm_head.weight"}:
        assert torch.equal(read_parameter(name, found[name], weights.read, model), loaded[name])
