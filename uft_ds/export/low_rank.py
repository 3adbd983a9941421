"""Read a plain LoRA adapter as one low-rank delta per weight; adapters with other features are refused."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor

from uft_ds.errors import UserError
from uft_ds.streams.adapter_files import HEAD_TENSOR, PREFIX, adapter_file, read_adapter_tensors
from uft_ds.streams.classifier import HEAD
from uft_ds.streams.lora_config import LORA_TENSOR, WITHOUT_EFFECT, read_lora_config

_MERGED = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"}
"""Config fields from which a delta is computed."""
_OF_THE_START = {"loftq_config", "corda_config", "ensure_weight_tying"}
"""Config fields that only record how an adapter was made. `read_lora_config` refuses starts that change the base."""


@dataclass(frozen=True)
class LowRank:
    """scale * B A, for one weight. a: [rank, in], b: [out, rank]."""

    a: Tensor
    b: Tensor
    scale: float

    def delta(self) -> Tensor:
        """[out, in], float32."""
        return (self.b.float() @ self.a.float()).mul_(self.scale)


def read_low_rank(folder: Path) -> dict[str, LowRank]:
    """The deltas of a PEFT adapter, by the name of the weight to which each is added.

    Raises:
        UserError: the adapter is not a plain LoRA; names the field or the tensor.
    """
    config = read_adapter_config(folder / "adapter_config.json")
    return low_rank_of(read_adapter_tensors(folder), config, label=str(adapter_file(folder)))


def read_with_head(folder: Path) -> tuple[dict[str, LowRank], Tensor]:
    """The deltas of a reward model's adapter, as `read_low_rank` returns them, and its head: [1, hidden].

    Raises:
        UserError: the adapter is not a plain LoRA with a head; names the field or the tensor.
    """
    label = str(adapter_file(folder))
    tensors = read_adapter_tensors(folder)
    head = tensors.pop(HEAD_TENSOR, None)
    if head is None or head.dim() != 2 or head.shape[0] != 1 or not torch.isfinite(head.float()).all():
        found = "no such tensor" if head is None else f"{list(head.shape)}"
        raise UserError(f"{label}: {HEAD_TENSOR}: {found}; expected the finite head of a reward model, [1, hidden]")
    config = read_adapter_config(folder / "adapter_config.json", with_head=True)
    return low_rank_of(tensors, config, label=label), head


def read_adapter_config(path: Path, *, with_head: bool = False) -> dict[str, Any]:
    """A plain LoRA's config, with PEFT's defaults filled in.

    Args:
        with_head: whether a reward model's head belongs to the adapter.
    Raises:
        UserError: the file is not the config of a plain LoRA; names the field.
    """
    config, defaults = read_lora_config(path), LoraConfig().to_dict()
    if with_head and config["modules_to_save"] == [HEAD]:
        config["modules_to_save"] = None
    elif config["modules_to_save"] == [HEAD]:
        raise UserError(
            f"{path}: the adapter of a reward model, which has a head; convert the run that trained it, by --to "
            "reward-model"
        )
    for key in sorted(set(defaults) - _MERGED - WITHOUT_EFFECT - _OF_THE_START):
        if (config[key] or None) != (defaults[key] or None):
            raise UserError(
                f"{path}: {key}: {config[key]!r} found, expected {defaults[key]!r}: only a plain LoRA can be merged "
                "faithfully"
            )
    return config


def low_rank_of(tensors: Mapping[str, Tensor], config: Mapping[str, Any], *, label: str) -> dict[str, LowRank]:
    """Pairs of A and B with their scales, by the name of the weight.

    Raises:
        UserError: a tensor is missing, has another shape than the config says, or is not finite; or all B are zero.
    """
    sides: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = LORA_TENSOR.fullmatch(name)
        if match is None:
            hint = "; PEFT has saved a layer of the base too: save with save_embedding_layers=False"
            why = hint if ".base_layer." in name or "embed" in name else ""
            raise UserError(f"{label}: {name}: not part of a plain LoRA; it cannot be merged{why}")
        # The PEFT model may be a submodule of another one: drop everything up to PEFT's own prefix.
        sides.setdefault(match["module"].rpartition(PREFIX)[2], {})[match["side"]] = tensor
    found: dict[str, LowRank] = {}
    for module, pair in sides.items():
        both = set(pair) == {"A", "B"} and all(tensor.dim() == 2 for tensor in pair.values())
        if not both or pair["A"].shape[0] != pair["B"].shape[1]:
            shapes = {side: list(tensor.shape) for side, tensor in sorted(pair.items())}
            empty = any(tensor.numel() == 0 for tensor in pair.values())
            why = "; it was saved under ZeRO-3 without gathering its shards" if empty else ""
            raise UserError(f"{label}: {module}: found {shapes}, expected A of [rank, in] and B of [out, rank]{why}")
        rank = pair["A"].shape[0]
        asked = _of_pattern(config["rank_pattern"], module, config["r"])
        if rank != asked:
            raise UserError(f"{label}: {module} has rank {rank}, its config says {asked}")
        alpha = _of_pattern(config["alpha_pattern"], module, config["lora_alpha"])
        scale = alpha / math.sqrt(rank) if config["use_rslora"] else alpha / rank
        for side, tensor in pair.items():
            if not tensor.is_floating_point():
                raise UserError(
                    f"{label}: {module}.lora_{side}: stored as {str(tensor.dtype).removeprefix('torch.')}: it is "
                    "quantised, and without its scale it is another number"
                )
            if not torch.isfinite(tensor.float()).all():  # torch has no isfinite of 8-bit numbers
                raise UserError(f"{label}: {module}.lora_{side}: not finite")
        found[f"{module}.weight"] = LowRank(pair["A"], pair["B"], scale)
    if not found:
        raise UserError(f"{label}: holds no adapter")
    if not any(low_rank.b.any() for low_rank in found.values()):
        raise UserError(f"{label}: every B is zero: this adapter was never trained")
    return found


def _of_pattern(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """A module's value, matched as PEFT does: a key is the end of a module's name, or a regular expression for it."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default
