"""Names in memory are not names in the files: what is trained can be merged and compared all the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import EXPERTS, SIZES
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from suites import long_but
from tiny import build_tiny_tokenizer
from transformers import AutoModelForCausalLM
from transformers.models.gemma3 import Gemma3Config, Gemma3ForConditionalGeneration
from transformers.models.llama import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.models.mixtral import MixtralConfig, MixtralForCausalLM
from transformers.models.qwen3_moe import Qwen3MoeConfig, Qwen3MoeForCausalLM

from uft_ds.errors import UserError
from uft_ds.export.convert import convert_to_merged
from uft_ds.export.streamed_logps import empty_model
from uft_ds.streams.load import check_base, meta_model
from uft_ds.streams.stored_names import stored_weights
from uft_ds.streams.weights import check_weights

VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
ATTENTION = ["q_proj", "o_proj"]
BASES: dict[str, tuple[Any, Any, Any]] = {
    "multimodal class": (
        Gemma3Config(
            text_config=SIZES | {"head_dim": 16}, vision_config=VISION, mm_tokens_per_image=1, boi_token_index=10,
            eoi_token_index=11, image_token_index=12,
        ),
        Gemma3ForConditionalGeneration,
        r".*language_model\.layers.*(q_proj|down_proj)",
    ),
    "experts": (Qwen3MoeConfig(**SIZES, **EXPERTS, head_dim=16), Qwen3MoeForCausalLM, ATTENTION),
    "experts of other names": (MixtralConfig(**SIZES, num_local_experts=4), MixtralForCausalLM, ATTENTION),
    "saved without a head": (LlamaConfig(**SIZES, tie_word_embeddings=True), LlamaModel, ATTENTION),
}  # fmt: skip


def built(folder: Path, config: Any, model_class: Any) -> Path:
    torch.manual_seed(0)
    model_class(config).to(torch.float32).save_pretrained(folder)
    build_tiny_tokenizer(folder)
    return folder


def adapter_of(base: Path, folder: Path, targets: Any, **saving: Any) -> Path:
    policy = get_peft_model(loaded(base), LoraConfig(r=4, target_modules=targets))
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    policy.save_pretrained(str(folder), **saving)
    return folder


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.eval()(input_ids=torch.arange(20, 60)[None]).logits
    return found


@pytest.mark.parametrize("kind", long_but(("multimodal class", "experts of other names"), BASES))
def test_an_adapter_is_merged_whatever_the_files_call_its_weights(tmp_path: Path, kind: str) -> None:
    """The merged model's logits are PEFT's, and the comparison of log-ratios runs and agrees."""
    config, model_class, targets = BASES[kind]
    base = built(tmp_path / "base", config, model_class)
    adapter = adapter_of(base, tmp_path / "adapter", targets)
    result = convert_to_merged(adapter, tmp_path / "merged", base=str(base), say=lambda _: None)
    assert result.agreement is not None
    assert result.agreement.share_kept == pytest.approx(1.0, abs=1e-3)
    expected = logits(PeftModel.from_pretrained(loaded(base), str(adapter)))
    assert (logits(loaded(base)) - expected).abs().max() > 1e-3
    assert (logits(loaded(tmp_path / "merged")) - expected).abs().max() < 1e-4


def test_what_is_stored_in_parts_takes_no_adapter(tmp_path: Path) -> None:
    """Before anything is launched or merged: the parameter, and the first of its tensors in the files."""
    config, model_class, _ = BASES["experts"]
    base = built(tmp_path, config, model_class)
    model = meta_model(check_base(str(base), None))
    with pytest.raises(UserError, match=r"gate_up_proj is stored as .*experts\.0\.gate_proj\.weight \(of 8\)"):
        stored_weights(base, model, check_weights(base, model), ["model.layers.0.mlp.experts.gate_up_proj"])


@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings:UserWarning")
def test_a_head_that_is_merged_apart_is_no_longer_tied(tmp_path: Path) -> None:
    """A tied base whose file holds the head too: some loaders would tie the merged head, and lose the adapter."""
    config = LlamaConfig(**SIZES, tie_word_embeddings=True)
    base = built(tmp_path / "base", config, LlamaForCausalLM)
    plain = adapter_of(base, tmp_path / "plain", ["q_proj"])
    adapter = adapter_of(base, tmp_path / "adapter", ["q_proj", "lm_head"], save_embedding_layers=False)
    with pytest.raises(UserError, match=r"holds no lm_head\.weight.*the model has no head of its own"):
        convert_to_merged(adapter, tmp_path / "merged", base=str(base), say=lambda _: None)
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    for source, is_tied in ((adapter, False), (plain, True)):
        out = tmp_path / source.name / "merged"
        result = convert_to_merged(source, out, base=str(base), say=lambda _: None)
        assert result.agreement is not None
        assert result.agreement.share_kept == pytest.approx(1.0, abs=1e-3)
        assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is is_tied
        assert empty_model(check_base(str(out), None)).config.tie_word_embeddings is is_tied
