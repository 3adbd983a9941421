"""Tiny models of images and text, saved as Hugging Face folders, for text alone."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tiny import IM_END, IM_START, VOCAB_SIZE, build_tiny_tokenizer

TEXT: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.1,
    "bos_token_id": IM_START, "eos_token_id": IM_END, "pad_token_id": IM_END,
}  # fmt: skip
IMAGES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
WRAPPERS: dict[str, Any] = {
    "gemma3": hf.Gemma3Config(
        text_config=TEXT | {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8},
        vision_config=IMAGES,
        mm_tokens_per_image=4,
        image_token_index=5,
        boi_token_index=6,
        eoi_token_index=7,
    ),
    "qwen2_5_vl": hf.Qwen2_5_VLConfig(
        text_config=TEXT
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}},
        vision_config={
            "hidden_size": 32, "intermediate_size": 48, "depth": 1, "num_heads": 2, "out_hidden_size": 64,
            "patch_size": 14, "spatial_merge_size": 1, "fullatt_block_indexes": [0], "window_size": 28,
        },
        image_token_id=5,
        video_token_id=6,
        vision_start_token_id=7,
        vision_end_token_id=8,
    ),
    "mistral3": hf.Mistral3Config(
        text_config=TEXT | {"model_type": "mistral", "head_dim": 16},
        vision_config=IMAGES | {"model_type": "pixtral", "head_dim": 16},
        image_token_index=5,
        spatial_merge_size=1,
    ),
}  # fmt: skip

OF_IMAGES = "preprocessor_config.json"


def build_wrapper(folder: Path, name: str) -> Path:
    """A random float32 model and its tokenizer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = hf.AutoModelForImageTextToText.from_config(deepcopy(WRAPPERS[name])).to(torch.float32)
    model.generation_config = hf.GenerationConfig(bos_token_id=IM_START, eos_token_id=IM_END, pad_token_id=IM_END)
    model.save_pretrained(folder)
    (folder / OF_IMAGES).write_text('{"image_processor_type": "SiglipImageProcessor"}')
    return build_tiny_tokenizer(folder)
