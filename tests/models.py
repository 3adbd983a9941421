"""Tiny random models of many families, one line each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any

import numpy as np
import torch
import transformers as hf
from wrappers import WRAPPERS

from uft_ds.data.example import Response, Sequence
from uft_ds.streams.adapters import add_adapters
from uft_ds.streams.load import attention_implementation, model_of
from uft_ds.streams.model import UFTModel

VOCAB_SIZE, SPREAD = 259, 0.1
HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_hidden_layers": 2, "hidden_size": 64, "vocab_size": VOCAB_SIZE}
SIZES: dict[str, Any] = HEADS | {
    "intermediate_size": 96, "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0,
    "initializer_range": SPREAD,
}  # fmt: skip
GPT: dict[str, Any] = {
    "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512, "vocab_size": VOCAB_SIZE, "initializer_range": SPREAD,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip
MAMBA: dict[str, Any] = {
    "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 16,
    "mamba_expand": 2,
}  # fmt: skip
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
DELTA: dict[str, Any] = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "shared_expert_intermediate_size": 32, "layer_types": ["linear_attention", "full_attention"], "head_dim": 16,
}  # fmt: skip


class Configs(Mapping[str, Any]):
    """Configs by name, a fresh copy each time: a model leaves its attention and number type in its config."""

    def __init__(self, configs: Mapping[str, Any]) -> None:
        self._configs = dict(configs)

    def __getitem__(self, name: str) -> Any:
        return deepcopy(self._configs[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._configs)

    def __len__(self) -> int:
        return len(self._configs)

    def __or__(self, other: Mapping[str, Any]) -> Configs:
        return Configs(self._configs | dict(other))


PACKED = Configs(
    {
        "qwen2": hf.Qwen2Config(**SIZES),
        "qwen3": hf.Qwen3Config(**SIZES, head_dim=16),
        "llama": hf.LlamaConfig(**SIZES),
        "mistral": hf.MistralConfig(**SIZES, sliding_window=8),
        "gpt_neox": hf.GPTNeoXConfig(**{key: value for key, value in SIZES.items() if key != "num_key_value_heads"}),
        "phi3": hf.Phi3Config(**SIZES),
        "gemma2": hf.Gemma2Config(
            **SIZES, head_dim=16, query_pre_attn_scalar=16, sliding_window=8, final_logit_softcapping=3.0
        ),
        "gemma3_text": hf.Gemma3TextConfig(
            **SIZES,
            head_dim=16,
            query_pre_attn_scalar=16,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention"],
        ),
        "olmo2": hf.Olmo2Config(**SIZES),
        "granite": hf.GraniteConfig(**SIZES, logits_scaling=0.25),
        "phi": hf.PhiConfig(**SIZES),
        "gemma": hf.GemmaConfig(**SIZES, head_dim=16),
        "cohere": hf.CohereConfig(**SIZES, logit_scale=0.5),
        "cohere2": hf.Cohere2Config(**SIZES, logit_scale=0.5, head_dim=16, sliding_window=8),
        "qwen2_moe": hf.Qwen2MoeConfig(**SIZES, **EXPERTS, shared_expert_intermediate_size=32),
        "qwen3_moe": hf.Qwen3MoeConfig(**SIZES, **EXPERTS, head_dim=16),
        "mixtral": hf.MixtralConfig(**SIZES, num_local_experts=4),
        "olmoe": hf.OlmoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2),
        "qwen2_5_vl": WRAPPERS["qwen2_5_vl"],
        "gptj": hf.GPTJConfig(**GPT, rotary_dim=8),
        "codegen": hf.CodeGenConfig(**GPT, rotary_dim=8),
    }
)
"""Packed rows equal rows of one sequence, log-probs and gradients."""

GPT2 = hf.GPT2Config(**GPT)
"""It packs, but its layers are no linear ones."""

LEAKS = Configs(
    {
        "granitemoehybrid": hf.GraniteMoeHybridConfig(
            **SIZES, **MAMBA, layer_types=["mamba", "attention"], num_local_experts=0, shared_intermediate_size=128
        ),
        "recurrent_gemma": hf.RecurrentGemmaConfig(**SIZES, head_dim=16, lru_width=64, attention_window_size=64),
        "opt": hf.OPTConfig(
            **HEADS, ffn_dim=96, word_embed_proj_dim=64, init_std=SPREAD, dropout=0.0, max_position_embeddings=512
        ),
        "bamba": hf.BambaConfig(**SIZES, **MAMBA, attn_layer_indices=[1]),
        "qwen3_next": hf.Qwen3NextConfig(**SIZES, **EXPERTS, **DELTA),
        "lfm2": hf.Lfm2Config(**SIZES, full_attn_idxs=[1]),
        "gpt_oss": hf.GptOssConfig(
            **SIZES, num_local_experts=4, num_experts_per_tok=2, head_dim=16, sliding_window=8, eos_token_id=2
        ),
        "mamba": hf.MambaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=64,
            num_hidden_layers=2,
            state_size=16,
            initializer_range=SPREAD,
            residual_in_fp32=False,
        ),
        "falcon": hf.FalconConfig(**HEADS, initializer_range=SPREAD),
        "bloom": hf.BloomConfig(vocab_size=VOCAB_SIZE, hidden_size=64, n_layer=2, n_head=4, initializer_range=SPREAD),
    }
)
"""Packed sequences change each other."""

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
TARGETS: dict[str, list[str]] = {
    "qwen3_moe": ATTENTION,
    "mixtral": ATTENTION,
    "olmoe": ATTENTION,
    "mamba": ["in_proj", "x_proj"],
}
"""Where adapters on all linear layers would be refused: on experts, and on a projection whose weight Mamba's kernel
reads itself."""


def tiny_policy(
    config: Any,
    *,
    dtype: torch.dtype = torch.float32,
    b_std: float = 0.05,
    targets: Any = None,
    attention: str = "auto",
) -> Any:
    """A random model with adapters on all linear layers."""
    torch.manual_seed(0)
    attention = attention_implementation(attention, dtype, config)
    base = model_of(deepcopy(config)).to(dtype)
    base.get_decoder().config._attn_implementation = attention
    base.requires_grad_(False)
    policy = add_adapters(base, rank=4, alpha=8.0, targets=targets or "all-linear", dtype=torch.float32, seed=1)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name and b_std:
            torch.nn.init.normal_(parameter, std=b_std)
    return policy


def tiny_model(config: Any, **options: Any) -> UFTModel:
    """The module that the engine runs, with two separate forwards."""
    return UFTModel(tiny_policy(config, **options), reference_mode="separate")


def sequences(*lengths: int) -> list[Sequence]:
    """Random tokens, the last two thirds of each a response."""
    rng = np.random.default_rng(0)
    return [
        Sequence(
            rng.integers(3, 250, size=length).astype(np.int32),
            (Response(length // 3, length, float(rng.random()), "score", f"tiny:{length}"),),
        )
        for length in lengths
    ]
