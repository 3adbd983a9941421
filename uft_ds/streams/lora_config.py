"""Read PEFT's adapter_config.json of a LoRA, and tell which of its fields and tensors `uft convert` understands."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

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
    """All fields of an adapter's config; fields that an older version did not write have PEFT's defaults.

    Raises:
        UserError: the config is not a LoRA's, has fields that the installed PEFT does not know, or changes the base.
    """
    try:
        given: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        kind, start = given["peft_type"], given.get("init_lora_weights", True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read as an adapter's config ({type(error).__name__}: {error})") from None
    if kind != "LORA":
        raise UserError(f"{path}: peft_type: {kind!r} found, expected 'LORA'")
    defaults = LoraConfig().to_dict()
    unknown = sorted(set(given) - set(defaults))
    if unknown:
        raise UserError(f"{path}: {unknown[0]}: not known to the installed PEFT; update PEFT")
    if start not in _LEAVE_THE_BASE:
        raise UserError(
            f"{path}: init_lora_weights: {start!r} changes the base's weights too: added to the base as it is, the "
            "result would be wrong; convert it to a plain LoRA first (PEFT's save_pretrained with "
            "path_initial_model_for_weight_conversion)"
        )
    return {**defaults, **given}
