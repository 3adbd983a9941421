"""Read PEFT's adapter_config.json of a LoRA, and tell which of its fields and tensors `uft convert` understands."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import peft
from peft import LoraConfig

from uft_ds.errors import UserError

WITHOUT_EFFECT = frozenset({
    "auto_mapping", "base_model_name_or_path", "eva_config", "exclude_modules", "inference_mode", "init_lora_weights",
    "layers_pattern", "layers_to_transform", "lora_dropout", "megatron_config", "megatron_core", "peft_type",
    "peft_version", "revision", "runtime_config", "target_modules", "task_type",
})  # fmt: skip
"""Fields that do not change what a frozen adapter computes, or whose effect its tensors already show."""

_LEAVE_THE_BASE = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the base's weights unchanged; PiSSA, OLoRA and others change them."""

LORA_TENSOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(\.default)?\.weight")
"""Name of a LoRA tensor, in a model or in a file of PEFT's."""


def is_plain_lora(name: str, shape: Seq[int], rank: int) -> bool:
    """Whether a trained parameter is one that `uft convert` reads back: A of [rank, in], or B of [out, rank].

    PEFT puts `base_layer` into the names of the adapters of an expert's second parameter, and their rank is not the
    config's.
    """
    match = LORA_TENSOR.fullmatch(name)
    if match is None or ".base_layer" in match["module"] or len(shape) != 2:
        return False
    return shape[0 if match["side"] == "A" else 1] == rank


def read_lora_config(path: Path) -> dict[str, Any]:
    """All of PEFT's fields of an adapter's config; fields that an older version did not write have PEFT's defaults.

    Fields that PEFT does not know are passed over if they are null, false or empty: an older version or another package
    wrote them, and they ask for nothing.

    Raises:
        UserError: the config is not a LoRA's, a value has another type than PEFT's, a field asks for what the
            installed PEFT does not know, or the base is changed. The message names the field.
    """
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(given, dict):
            raise ValueError(f"{json.dumps(given)[:40]} found, expected an object")
        kind, start = given["peft_type"], given.get("init_lora_weights", True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as an adapter's config ({type(error).__name__}: {error})") from None
    if kind != "LORA":
        raise UserError(f"{path}: peft_type: {kind!r} found, expected 'LORA'")
    defaults = LoraConfig().to_dict()
    unknown = sorted(key for key in set(given) - set(defaults) if given[key])
    if unknown:
        raise UserError(
            f"{path}: {unknown[0]}: {given[unknown[0]]!r}: not known to the installed PEFT {peft.__version__}; another "
            "version or another package wrote this field, and it may change what the adapter computes: save the "
            "adapter as a plain LoRA, or remove the field if it has no effect"
        )
    if start not in _LEAVE_THE_BASE:
        raise UserError(
            f"{path}: init_lora_weights: {start!r} changes the base's weights too: added to the base as it is, the "
            "result would be wrong; convert it to a plain LoRA first (PEFT's save_pretrained with "
            "path_initial_model_for_weight_conversion)"
        )
    config = defaults | {key: value for key, value in given.items() if key in defaults}
    for key, (is_right, expected) in _VALUES.items():
        if not is_right(config[key]):
            raise UserError(f"{path}: {key}: {config[key]!r} found, expected {expected}")
    return config


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_pattern(value: Any, is_right: Callable[[Any], bool]) -> bool:
    """Whether a field maps names of modules, which may be regular expressions, to values."""
    if value is None:
        return True
    return isinstance(value, dict) and all(_is_expression(key) and is_right(found) for key, found in value.items())


def _is_expression(text: str) -> bool:
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def _are_names(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(name, str) for name in value)
    return value is None or (isinstance(value, str) and _is_expression(value))


_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_is_count, "a whole number from 1 on"),
    "lora_alpha": (_is_number, "a finite number"),
    "lora_dropout": (_is_number, "a number"),
    "use_rslora": (lambda value: value is None or isinstance(value, bool), "true or false"),
    "rank_pattern": (
        lambda value: _is_pattern(value, _is_count),
        "an object of modules, or regular expressions for them, and ranks",
    ),
    "alpha_pattern": (
        lambda value: _is_pattern(value, _is_number),
        "an object of modules, or regular expressions for them, and numbers",
    ),
    "target_modules": (_are_names, "a list of names or a regular expression"),
    "exclude_modules": (_are_names, "a list of names or a regular expression"),
    "target_parameters": (_are_names, "a list of names"),
    "base_model_name_or_path": (lambda value: value is None or isinstance(value, str), "a name or a path"),
}
"""For each field that is used: whether a value is of its type, and what is expected."""
