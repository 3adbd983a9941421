"""Base weights, attention and adapters from a recipe's plain values."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM

from uft_ds.architectures.facts import decoder_layers
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
    config = check_base(base, revision)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            base,
            revision=revision,
            dtype=dtype,
            attn_implementation=attention_implementation(attention, dtype, config),
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
    """Dropout is a layer, or a number by which a layer calls the function; a rate of 0 is none, as either."""
    for name, module in model.named_modules():
        for where, rate in _dropout_rates(module):
            if rate:
                raise UserError(
                    f"model.base: {name}{where} has a dropout of {rate}, expected 0 (log-ratios would be noise); see "
                    "config.json"
                )


def _dropout_rates(module: nn.Module) -> Iterator[tuple[str, float]]:
    """(attribute, rate) of a module itself: attention, BLOOM's blocks and others keep plain numbers."""
    if isinstance(module, _DropoutNd):
        yield "", module.p
    for key, value in vars(module).items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and re.search("dropout|pdrop|layerdrop", key):
            yield f".{key}", value


def attention_implementation(asked: str, dtype: torch.dtype, config: Any) -> str:
    """What `model.attention` means for a model of this config.

    `auto` becomes flash_attention_2 where it is installed, a GPU is present, and neither the type nor the model lacks
    it; else sdpa, or eager for a model without sdpa (Gemma 2's capped scores, GPT-J).

    Raises:
        UserError: a named implementation that transformers does not have for this model.
    """
    model_class = _causal_class(config)
    has = {
        "flash_attention_2": getattr(model_class, "_supports_flash_attn", True),
        "sdpa": getattr(model_class, "_supports_sdpa", True),
    }
    if asked == "auto":
        has_flash = torch.cuda.is_available() and importlib.util.find_spec("flash_attn") is not None
        if has_flash and dtype != torch.float32 and has["flash_attention_2"]:
            return "flash_attention_2"
        return "sdpa" if has["sdpa"] else "eager"
    if not has.get(asked, True):
        there = [name for name, is_there in has.items() if is_there]
        raise UserError(
            f"model.attention: transformers has no {asked} for {getattr(model_class, '__name__', 'this model')}; "
            f"expected auto, eager{''.join(f', {name}' for name in there)}"
        )
    return asked


def _causal_class(config: Any) -> Any:
    """The class that `AutoModelForCausalLM` takes for a config; None where it knows none."""
    return MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)


def decoder_layer_class(model: Any) -> type:
    """The class of the model's decoder layers, which ZeRO-3 gathers as a whole."""
    return type(decoder_layers(model.get_decoder())[0])
