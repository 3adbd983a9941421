"""Tiny random models and a byte-level tokenizer, saved as Hugging Face folders; nothing is downloaded."""

from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GenerationConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.utils import logging

Architecture = Literal[
    "qwen2", "qwen3", "llama", "mistral", "gemma2", "gemma3_text", "phi3", "granite", "olmo2", "gpt_neox"
]

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
END_OF_TEXT, IM_START, IM_END = range(3)
VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
MAX_LENGTH = 512

CLASSES = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM),
    "gemma3_text": (Gemma3TextConfig, Gemma3ForCausalLM),
    "phi3": (Phi3Config, Phi3ForCausalLM),
    "granite": (GraniteConfig, GraniteForCausalLM),
    "olmo2": (Olmo2Config, Olmo2ForCausalLM),
    "gpt_neox": (GPTNeoXConfig, GPTNeoXForCausalLM),
}

ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"]}
OWN: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 16},
    "gemma2": ALTERNATING
    | {"head_dim": 16, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "gemma3_text": ALTERNATING | {"head_dim": 16, "query_pre_attn_scalar": 16},
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    "granite": {
        "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.5, "logits_scaling": 0.25
    },
}  # fmt: skip
"""What makes each family what it is, with values that change its numbers at once."""


def build_tiny_tokenizer(folder: Path) -> Path:
    """Save a byte-level tokenizer (3 special tokens, then the 256 bytes, no merges) with ChatML; eos == pad.

    eos == pad == <|im_end|>, as in SmolLM2: code that finds padding by id must fail on it.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHATML
    wrapped.save_pretrained(folder)
    return folder


def rope_of(kind: str, limit: int) -> dict[str, Any]:
    """`rope_parameters` of 16-wide heads whose frequencies change where a sequence is longer than the limit.

    A dynamic kind takes the limit from the config's `max_position_embeddings`, longrope from these.
    """
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": limit}
    return rope | (factors if kind == "longrope" else {})


def build_tiny_model(
    folder: Path,
    architecture: Architecture = "qwen2",
    *,
    tied: bool = False,
    sliding_window: int | None = None,
    seed: int = 0,
    **further: Any,
) -> Path:
    """Save a random float32 model (2 layers, D=64, V=259) and its tokenizer.

    The initial standard deviation is 0.1, five times the usual: outputs differ between prompts and positions.
    further: keys of the config, over those that the family has here.
    """
    config_class, model_class = CLASSES[architecture]
    own: dict[str, Any] = dict(OWN.get(architecture, {}))
    if architecture in ("mistral", "phi3"):
        own |= {"sliding_window": sliding_window}
    elif architecture.startswith("gemma"):
        own |= {"sliding_window": sliding_window or 8}
    elif sliding_window is not None:
        if not architecture.startswith("qwen"):
            raise ValueError(f"{architecture} has no sliding window")
        own |= {"use_sliding_window": True, "sliding_window": sliding_window, "max_window_layers": 1}
    if architecture != "gpt_neox":
        own |= {"num_key_value_heads": 2}
    config = config_class(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        initializer_range=0.1,
        tie_word_embeddings=tied,
        bos_token_id=IM_START,
        eos_token_id=IM_END,
        pad_token_id=IM_END,
        **({"num_hidden_layers": 2, "max_position_embeddings": MAX_LENGTH} | own | further),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
    model = model.to(torch.float32)
    model.generation_config = GenerationConfig(bos_token_id=IM_START, eos_token_id=IM_END, pad_token_id=IM_END)
    logging.disable_progress_bar()
    model.save_pretrained(folder)
    build_tiny_tokenizer(folder)
    return folder
