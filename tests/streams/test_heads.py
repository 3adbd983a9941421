"""The model's own head as it gives log-probs: what models do to their logits, and a head that is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import END_OF_TEXT, IM_END, IM_START, VOCAB_SIZE, build_tiny_model, build_tiny_tokenizer
from toy import logps_through_logits, token_logps, toy_model, toy_sequences
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    PretrainedConfig,
)

from uft_ds.data.micro_batch import micro_batch
from uft_ds.kernels.logits import UNCHANGED, LogitTransform
from uft_ds.streams.heads import logit_transform_of

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "bos_token_id": IM_START,
    "eos_token_id": IM_END,
    "pad_token_id": END_OF_TEXT,
}

CHANGED = {
    "granite": (GraniteConfig(**SIZES, logits_scaling=0.25), LogitTransform(scale=4.0)),
    "cohere": (CohereConfig(**SIZES, logit_scale=0.5), LogitTransform(scale=0.5)),
    "gemma2": (Gemma2Config(**SIZES, final_logit_softcapping=3.0), LogitTransform(softcap=3.0)),
}
"""Models that change their logits after the head, by how much, each enough to be seen."""


@pytest.mark.parametrize("name", CHANGED)
def test_what_a_model_does_to_its_logits_is_done(tmp_path: Path, name: str) -> None:
    """Granite divides, Cohere multiplies, Gemma 2 caps: log-probs and their gradients are those through Hugging Face's
    own logits, and others than without."""
    config, transform = CHANGED[name]
    assert logit_transform_of(config) == transform
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    build_tiny_tokenizer(tmp_path)
    model = toy_model(tmp_path, reference_mode="separate", attention="eager")
    head: Any = model.policy.get_base_model().get_output_embeddings()
    batch = micro_batch(toy_sequences(3))
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    own_N, _ = token_logps(model, batch)
    theirs_N = logps_through_logits(model, batch)
    torch.testing.assert_close(own_N, theirs_N, rtol=0, atol=1e-5)
    grads, their_grads = (torch.autograd.grad(logps_N.sum(), adapters) for logps_N in (own_N, theirs_N))
    for grad, their_grad in zip(grads, their_grads, strict=True):
        torch.testing.assert_close(grad, their_grad, rtol=0, atol=2e-5 * float(their_grad.abs().max()) + 1e-7)

    head.transform = UNCHANGED
    with torch.no_grad():
        assert float((token_logps(model, batch)[0] - own_N).abs().max()) > 0.1


def test_most_models_change_nothing() -> None:
    """Null and absent keys alike."""
    assert logit_transform_of(LlamaConfig()) == UNCHANGED
    assert logit_transform_of(PretrainedConfig(final_logit_softcapping=None)) == UNCHANGED


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_trainable_head_gets_its_gradient(tmp_path: Path, tied: bool) -> None:
    """Of head and adapters, equal to autograd's through Hugging Face's own logits; tied, the embedding's share too."""
    model = toy_model(build_tiny_model(tmp_path, "qwen3", tied=tied), trains_head=True)
    batch = micro_batch(toy_sequences(3))
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("lora" not in name for name in trained)
    (own_N,) = token_logps(model, batch, "policy")
    grads = torch.autograd.grad(own_N.sum(), list(trained.values()))
    theirs = torch.autograd.grad(logps_through_logits(model, batch).sum(), list(trained.values()))
    for name, grad, their_grad in zip(trained, grads, theirs, strict=True):
        torch.testing.assert_close(grad, their_grad, rtol=0, atol=1e-5 * float(their_grad.abs().max()), msg=name)


@pytest.mark.parametrize("names", [("policy", "reference"), ("reference",)], ids=str)
def test_a_trainable_head_is_no_reference(tiny_qwen2: Path, names: tuple[str, ...]) -> None:
    """The reference goes through the head as it is now: with a head that moves it would move too."""
    model = toy_model(tiny_qwen2, trains_head=True)
    with (
        pytest.raises(RuntimeError, match="if the head is trained, no stream can be without gradient"),
        torch.no_grad(),
    ):
        token_logps(model, micro_batch(toy_sequences(2)), *names)


def test_memory_for_logits_changes_no_number(tiny_qwen2: Path) -> None:
    """Tiles of 16 columns: both streams equal to rounding, policy and reference still exactly equal at the start."""
    batch = micro_batch(toy_sequences(3))
    default, tiled = (toy_model(tiny_qwen2, b_std=0, chunk_bytes=chunk_bytes) for chunk_bytes in (None, 1))
    logps_N, _ = token_logps(default, batch)
    tiled_N, reference_N = token_logps(tiled, batch)
    assert torch.equal(tiled_N, reference_N)
    torch.testing.assert_close(tiled_N, logps_N, rtol=0, atol=4e-6)
    assert not torch.equal(tiled_N, logps_N)
