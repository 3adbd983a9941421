"""Load the base model of a recipe: config, attention implementation and weights, with the checks of each."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Collection, Iterator
from contextlib import nullcontext
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
)

from uft_ds.architectures.facts import decoder_layers, is_routed, is_shown_to_pack, wraps_a_language_model
from uft_ds.errors import UserError
from uft_ds.host.hub import no_network_hint
from uft_ds.host.missing import begins_in_a_folder, has_the_form_of_a_path, no_such_folder
from uft_ds.host.terminal import in_one_line
from uft_ds.streams.nf4 import NF4, Whole, quantise
from uft_ds.streams.packed_attention import PACKED
from uft_ds.streams.recompute import Recompute, enable_recompute
from uft_ds.streams.stored_names import stored_experts, stored_weights
from uft_ds.streams.tied import check_tied
from uft_ds.streams.weights import check_weights, first_non_finite, loading_of, own_values, problem_of

_SHORT = 80
"""Letters of what the hub says of a name that most likely was meant as a path."""
ATTENTIONS = (PACKED, "flash_attention_2", "sdpa", "eager")
"""What `model.attention` may be, or select."""


def check_base(base: str, revision: str | None) -> Any:
    """The base model's config, read without its weights.

    Raises:
        UserError: there is no config, the model needs to run its own code, or its weights are quantised.
    """
    config = _config_of_base(base, revision)
    _check_not_quantised(base, config)
    return config


def _config_of_base(base: str, revision: str | None) -> Any:
    folder = Path(base)
    if has_the_form_of_a_path(base) and not folder.exists():  # the hub is not asked
        raise UserError(f"model.base: {base}: {no_such_folder(base)}")
    if folder.exists() and not (folder / "config.json").is_file():
        raise UserError(f"model.base: {base} {found_instead(folder)}; {_EXPECTED}")
    if folder.exists():
        if "auto_map" in _raw_config(folder / "config.json"):
            raise UserError(f"model.base: {base} needs code of its own (auto_map in config.json), which is never run")
        return config_of_folder(folder)
    try:
        return AutoConfig.from_pretrained(base, revision=revision, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001 - transformers raises many types here
        if begins_in_a_folder(base):
            raise UserError(
                f"model.base: {base}: {no_such_folder(base)}; the hub gives no such model either "
                f"({in_one_line(str(error), _SHORT)})"
            ) from None
        gguf = f"; repositories of GGUF files are not read, {_OF_GGUF}" if "gguf" in base.lower() else ""
        raise UserError(
            f"model.base: {base!r} is neither a local model folder nor available from the hub ({_one_line(error)})"
            f"{gguf or no_network_hint()}"
        ) from None


_EXPECTED = "expected a model folder in Hugging Face's layout, with config.json, safetensors and a tokenizer"
_OF_GGUF = "whose weights are rounded for inference: take the 16-bit model that it was made from"


def found_instead(path: Path) -> str:
    """What an existing path is that is no model folder, as the end of a sentence about it."""
    if path.is_file():
        try:
            with path.open("rb") as file:
                is_gguf = file.read(4) == b"GGUF"
        except OSError as error:
            return f"cannot be read ({error.strerror})"
        return f"is a GGUF file, {_OF_GGUF}" if is_gguf else "is a file"
    if any(path.glob("*.gguf")):
        return f"holds GGUF files, {_OF_GGUF}, and no config.json"
    return "holds no config.json"


def _check_not_quantised(base: str, config: Any) -> None:
    """Refuse GPTQ, AWQ, bitsandbytes, FP8 and the like: nothing can be merged into such weights."""
    parts = (config, config.get_text_config())
    found = next((q for part in parts if (q := getattr(part, "quantization_config", None))), None)
    if found is not None:
        method = (found if isinstance(found, dict) else vars(found)).get("quant_method", "an unnamed method")
        raise UserError(
            f"model.base: {base}: its weights are quantised ({getattr(method, 'value', method)}), "
            "see quantization_config in its config.json; no adapter can be merged into them: take the 16-bit "
            "model that it was made from"
        )


def config_of_folder(folder: Path) -> Any:
    """A local model's config, as transformers reads it. The model's own code is neither run nor refused.

    Raises:
        UserError: config.json is broken, transformers does not know the model, or it has no layers.
    """
    path = folder / "config.json"
    _raw_config(path)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001 - transformers raises many types here
        raise UserError(
            f"model.base: {path}: no config of a model that transformers knows ({_one_line(error)}); correct it, or "
            "fetch the model again"
        ) from None
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if isinstance(layers, int) and layers < 1:
        raise UserError(
            f"model.base: {path}: num_hidden_layers: {layers} found, expected a whole number from 1 on; correct it, or "
            "fetch the model again"
        )
    return config


def _check_generation_config(folder: Path) -> None:
    """Refuse a generation_config.json that answers and a converted model could not take over.

    Raises:
        UserError: names the file and the key.
    """
    path = folder / "generation_config.json"
    if not path.is_file():
        return
    raw = _raw_config(path)
    try:
        GenerationConfig.from_pretrained(folder)
    except Exception as error:  # noqa: BLE001 - transformers raises many types here
        raise UserError(f"model.base: {path}: {_one_line(error)}; correct it, or fetch the file again") from None
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = raw.get(key)
        if not all(
            type(token) is int for token in (ids if isinstance(ids, list) else [ids] if ids is not None else [])
        ):
            raise UserError(f"model.base: {path}: {key}: {ids!r} found, expected the number of a token, or null")


def _raw_config(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"model.base: {path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"model.base: {path}: not valid JSON ({error}); fetch the file again") from None
    if not isinstance(raw, dict):
        raise UserError(f"model.base: {path}: {json.dumps(raw)[:40]} found, expected an object; fetch the model again")
    return raw


def empty_base(config: Any) -> Any:
    """The base model of a config on the meta device: its structure, without values.

    Raises:
        UserError: no causal language model has such a config, or it has dropout; names the config.
    """
    for key in ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size"):
        value = getattr(config.get_text_config(), key, None)  # a multimodal config holds that of its text model
        if value is not None and (type(value) is not int or value < 1):
            raise UserError(f"model.base: {_named(config)}: {key}: {value!r} found, expected a whole number from 1 on")
    try:
        model = meta_model(config)
    except UserError as error:
        raise UserError(f"{error} ({_named(config)})") from None
    except (ArithmeticError, AttributeError, RuntimeError, TypeError) as error:  # caused by the config
        raise UserError(
            f"model.base: {_named(config)}: no model can be built from its config: {type(error).__name__}: {error}"
        ) from None
    _check_dropout(model, config)
    model.requires_grad_(False)
    return model


def _named(config: Any) -> str:
    """A config's origin and model type, for messages."""
    return f"config.json of {getattr(config, 'name_or_path', '') or 'a known model'} ({config.model_type})"


def meta_model(config: Any) -> Any:
    """The model of a config on the meta device; dropout is not refused.

    Raises:
        UserError: no causal language model has such a config.
    """
    try:
        with torch.device("meta"):
            return model_of(config)
    except (ValueError, KeyError) as error:
        raise UserError(f"model.base: no causal language model: {str(error).splitlines()[0]}") from None


def model_of(config: Any) -> Any:
    """The model of a config with random weights: a causal language model, or one of images and text used for text.

    Raises:
        ValueError, KeyError: transformers has no such model.
    """
    return auto_class(config).from_config(config, trust_remote_code=False)


def auto_class(config: Any) -> Any:
    """The class of transformers by whose name a model of this config is loaded, with its head for text."""
    is_wrapper = (
        type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    )
    return AutoModelForImageTextToText if is_wrapper else AutoModelForCausalLM


def check_base_files(folder: Path, adapted: Collection[str] = ()) -> tuple[Any, dict[str, Tensor]]:
    """Refuse a model's folder whose weight files do not hold the model of its config.json, or cannot be merged into.

    Only headers are read, and the values of tied weights that are stored twice.

    Args:
        adapted: names in memory of the weights that get an adapter.
    Returns:
        the model, and its stored tensors by their names in the files, all on the meta device.
    Raises:
        UserError: names the file and the tensor or the key; see `check_weights`, `check_tied` and `stored_weights`.
    """
    model = meta_model(config_of_folder(folder))
    _check_generation_config(folder)
    empty = check_weights(folder, model)
    check_tied(folder, model, empty)
    if adapted:
        stored_weights(folder, model, empty, (name for name in adapted if not is_routed(name)))
        stored_experts(folder, model, empty, [name for name in adapted if is_routed(name)])
    return model, empty


def embedding_rows(config: Any) -> int:
    """The number of token ids that a model of this config knows."""
    return int(config.get_text_config().vocab_size)


def load_base(
    base: str,
    *,
    revision: str | None,
    dtype: torch.dtype,
    attention: str,
    gradient_checkpointing: Recompute,
    quantization: str | None = None,
    whole: Whole = nullcontext,
) -> Any:
    """The base model, frozen and in training mode.

    Within `engine.engine.partitioned_loading` each rank keeps only its shard: transformers maps the files, reads them
    once, and distributes each parameter as it is read.

    Args:
        quantization: nf4: its linear layers are in 4 bits, see `streams/nf4.py`. None: as they are.
        whole: as for `quantise`, which gathers what is loaded in shards.
    Raises:
        UserError: the base cannot be loaded or trained; see `check_base`, `load_weights` and `quantise`.
    """
    config = check_base(base, revision)
    chosen = attention_implementation(attention, dtype, config)
    # The part of a wrapper that reads images is never run, and cannot be asked for packed rows.
    of_all = None if wraps_a_language_model(config) else chosen
    model = load_weights(base, revision=revision, dtype=dtype, attn_implementation=of_all)
    model.get_decoder().config._attn_implementation = chosen
    _check_dropout(model, config)
    model.requires_grad_(False)
    if quantization == NF4:
        quantise(model, whole)
    model.train()
    enable_recompute(model, gradient_checkpointing)
    return model


def load_weights(base: str, **options: Any) -> Any:
    """transformers' `from_pretrained` that refuses a base whose files do not hold the whole model.

    transformers would initialise missing tensors at random. Under ZeRO-3 the ranks see different problems: all of them
    list missing tensors, only rank 0 sees wrong shapes, and a NaN is in one rank's shard. So the ranks exchange what
    they found in one collective, and all refuse. Every rank must call it.

    Raises:
        UserError: on every rank.
    """
    try:
        loaded: Any = auto_class(_config_of_base(base, options.get("revision"))).from_pretrained(
            base,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported, then refused here
            **options,
        )
    except (OSError, ValueError, ImportError, UnpicklingError, SafetensorError, KeyError) as error:
        # Raised without the collective: the other ranks may be in the middle of loading and would never reach it. The
        # launcher ends them together with this one.
        raise UserError(f"model.base: {base!r} could not be loaded ({_one_line(error)})") from None
    except RuntimeError as error:
        if not str(error).startswith(_REPORTED):
            raise
        reason = _one_line(error).partition(" You may consider")[0]  # advice on transformers' own arguments
        problem: str | None = f"could not be loaded ({reason})"
    else:
        model, report = loaded
        problem = problem_of(loading_of(report), model)
        own = ((name, own_values(parameter)) for name, parameter in model.named_parameters())
        if problem is None and (name := first_non_finite(own)) is not None:
            problem = f"{name} holds NaN or infinity; the weights are damaged: fetch them again, or take another base"
    for found in _of_all_ranks(problem):
        if found is not None:
            raise UserError(f"model.base: {base!r}: {found}")
    return model


_REPORTED = ("Error(s) in loading state_dict", "We encountered some issues", "Failed to apply weight conversion")
"""Starts of transformers' messages that are raised after every rank has done its part of loading."""


def _one_line(error: BaseException) -> str:
    """The whole message in one line, because the reason is often not in its first line."""
    return in_one_line(str(error), 500) or type(error).__name__


def _of_all_ranks(value: str | None) -> list[str | None]:
    if not torch.distributed.is_initialized():
        return [value]
    values: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def _check_dropout(model: nn.Module, config: Any) -> None:
    """Refuse dropout with a rate above 0, whether it is a layer or a number that a layer passes to the function."""
    for name, module in model.named_modules():
        for where, rate in _dropout_rates(module):
            if rate:
                raise UserError(
                    f"model.base: {name}{where} has a dropout of {rate}, expected 0 (log-ratios would be noise) "
                    f"({_named(config)})"
                )


def _dropout_rates(module: nn.Module) -> Iterator[tuple[str, float]]:
    """Dropout rates of one module: (attribute, rate). Attention, BLOOM's blocks and others keep them as numbers."""
    if isinstance(module, _DropoutNd):
        yield "", module.p
    for key, value in vars(module).items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and re.search("dropout|pdrop|layerdrop", key):
            yield f".{key}", value


def attention_implementation(
    asked: str, dtype: torch.dtype, config: Any, *, has_flash_attention: bool | None = None
) -> str:
    """The attention implementation that `model.attention` selects for a model of this config.

    `auto` selects our own attention for packed rows, where the tests hold it against separate forwards. For other
    models: flash_attention_2 if it is installed, a GPU is present, and both the dtype and the model support it; else
    sdpa, or eager for a model without sdpa (GPT-J).

    Args:
        has_flash_attention: whether flash-attention and a GPU are there; None: whether they are on this machine.
    Raises:
        UserError: there is no such implementation for this model.
    """
    model_class = _causal_class(config)
    has = {
        PACKED: getattr(model_class, "_supports_attention_backend", False),
        "flash_attention_2": getattr(model_class, "_supports_flash_attn", True),
        "sdpa": getattr(model_class, "_supports_sdpa", True),
    }
    if asked == "auto":
        if has[PACKED] and is_shown_to_pack(config):
            return PACKED
        if has_flash_attention is None:
            has_flash_attention = torch.cuda.is_available() and importlib.util.find_spec("flash_attn") is not None
        if has_flash_attention and dtype != torch.float32 and has["flash_attention_2"]:
            return "flash_attention_2"
        return "sdpa" if has["sdpa"] else "eager"
    if not has.get(asked, True):
        there = [name for name, is_there in has.items() if is_there]
        raise UserError(
            f"model.attention: there is no {asked} for {getattr(model_class, '__name__', 'this model')}; "
            f"expected auto, eager{''.join(f', {name}' for name in there)}"
        )
    return asked


def _causal_class(config: Any) -> Any:
    """The class that transformers uses for a config; None if it knows none."""
    kinds = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
    return next((mapping[type(config)] for mapping in kinds if type(config) in mapping), None)


def decoder_layer_class(model: Any) -> type:
    """The class of the model's decoder layers, which ZeRO-3 gathers as a whole."""
    return type(decoder_layers(model.get_decoder())[0])
