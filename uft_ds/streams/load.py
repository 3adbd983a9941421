"""Base weights, attention and adapters from a recipe's plain values."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from uft_ds.errors import UserError


def check_is_there(base: str) -> None:
    """Refuse a path that leads nowhere, before the hub is asked for a model of that name.

    Raises:
        UserError: it looks like a path, and there is nothing.
    """
    looks_local = base.startswith(("/", ".", "~")) or base.count("/") > 1
    if looks_local and not Path(base).exists():
        raise UserError(f"model.base: {base}: no such folder")


def check_base(base: str, revision: str | None) -> Any:
    """The base model's config, read without its weights.

    Raises:
        UserError: there is none, or it asks to run code of its own.
    """
    check_is_there(base)
    folder = Path(base)
    if folder.exists() and not (folder / "config.json").is_file():
        raise UserError(f"model.base: {base} holds no config.json; expected a model folder in Hugging Face's layout")
    if folder.exists():
        try:
            raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"model.base: {folder / 'config.json'}: not valid JSON ({error})") from None
        if "auto_map" in raw:
            raise UserError(f"model.base: {base} needs code of its own (auto_map in config.json), which is never run")
    try:
        return AutoConfig.from_pretrained(base, revision=revision, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001 - transformers raises many types here
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"model.base: {base!r} is neither a local model folder nor to be had from the hub ({reason})"
        ) from None


def empty_base(config: Any) -> Any:
    """The model of a config on the meta device: its structure, without weights or memory.

    Raises:
        UserError: no causal language model has such a config.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (ValueError, KeyError) as error:
        raise UserError(f"model.base: no causal language model: {str(error).splitlines()[0]}") from None
    _check_dropout(model)
    model.requires_grad_(False)
    return model


def load_base(
    base: str,
    *,
    revision: str | None,
    dtype: torch.dtype,
    attention: str,
    gradient_checkpointing: bool,
) -> Any:
    """The base model, frozen and in training mode.

    Under `training.engine.partitioned_loading` each rank keeps only its shard: transformers reads the files
    once, maps them, and hands every parameter out as it goes.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(
            base,
            revision=revision,
            dtype=dtype,
            attn_implementation=attention_implementation(attention, dtype),
            trust_remote_code=False,
        )
    except (OSError, ValueError, ImportError, UnpicklingError) as error:
        raise UserError(f"model.base: {base!r} could not be loaded ({str(error).splitlines()[0]})") from None
    _check_dropout(model)
    model.requires_grad_(False)
    model.train()
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def _check_dropout(model: nn.Module) -> None:
    """Attention keeps its rate as a plain number, not as a layer."""
    for name, module in model.named_modules():
        rate = module.p if isinstance(module, nn.Dropout) else getattr(module, "attention_dropout", 0.0)
        if rate:
            raise UserError(
                f"model.base: {name} has a dropout of {rate}, expected 0 (log-ratios would be noise); see config.json"
            )


def attention_implementation(asked: str, dtype: torch.dtype) -> str:
    """`auto` becomes flash_attention_2 where it is installed, a GPU is present and the type is not one it lacks."""
    if asked != "auto":
        return asked
    has_flash = torch.cuda.is_available() and importlib.util.find_spec("flash_attn") is not None
    return "flash_attention_2" if has_flash and dtype != torch.float32 else "sdpa"


def decoder_layer_class(model: Any) -> type:
    """The class of the model's decoder layers, which ZeRO-3 gathers as a whole."""
    layers = model.get_decoder().layers
    return type(layers[0])


def attention_parity(config: Any) -> float:
    """Tokens at which a sequence's attention takes as many FLOPs as the rest of the model's layers; inf if unknown.

        d hidden size, f width of the MLP, q = query heads x head_dim, k = key-value heads x head_dim
        parameters = 2 d q + 2 d k + 3 d f      query and output, key and value, gate, up and down projections
        the rest, of a token and a layer        2 x parameters
        attention, of T tokens, causal          2 q T     T / 2 keys on average: 2 q for QK^T and 2 q for AV, each
        equal at                                T = parameters / q

    Forward and backward stand in the same proportion. A sliding window is not counted: beyond it, attention is taken
    for more than it is.
    """
    names = ("hidden_size", "intermediate_size", "num_attention_heads")
    if not all(getattr(config, name, None) for name in names):
        return math.inf
    hidden, mlp, heads = (int(getattr(config, name)) for name in names)
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    query = heads * head_dim
    key_value = (getattr(config, "num_key_value_heads", None) or heads) * head_dim
    return float((2 * hidden * query + 2 * hidden * key_value + 3 * hidden * mlp) / query)
