"""Read a LoRA adapter as low-rank deltas of weights, those of routed experts too; other features are refused."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from peft import LoraConfig
from torch import Tensor

from uft_ds.architectures.facts import is_routed
from uft_ds.errors import UserError
from uft_ds.streams.adapter_files import HEAD_TENSOR, PREFIX, adapter_file, read_adapter_tensors
from uft_ds.streams.classifier import HEAD
from uft_ds.streams.experts import without_wrappers
from uft_ds.streams.lora_config import LORA_TENSOR, WITHOUT_EFFECT, read_lora_config

_MERGED = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"}
"""Config fields from which a delta is computed."""
_EXPERTS = "target_parameters"
"""Config field of adapters of routed experts."""
_FIRST_OF_LAYOUT = Version("0.19")
"""PEFT that ordered the adapters of experts as it does now (0.21)."""
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


@dataclass(frozen=True)
class ExpertsLowRank:
    """The deltas of one weight of all routed experts. a: [experts, rank, in], b: [out, rank, experts]."""

    a: Tensor
    b: Tensor
    scale: float

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the weight: [experts, out, in]."""
        return self.a.shape[0], self.b.shape[0], self.a.shape[2]

    def of(self, expert: int, rows: Tensor) -> LowRank:
        """The delta of some rows of one expert's weight."""
        return LowRank(self.a[expert], self.b[rows, :, expert], self.scale)


def read_low_rank(folder: Path) -> dict[str, LowRank | ExpertsLowRank]:
    """The deltas of a PEFT adapter, by the name of the weight to which each is added.

    Those of experts have the name of PEFT's wrapper, `MODULE.weight` or `MODULE.base_layer.weight`; which of the
    module's weights that is, the shape tells.

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
    deltas = low_rank_of(tensors, config, label=label)
    plain = {name: delta for name, delta in deltas.items() if isinstance(delta, LowRank)}
    assert plain.keys() == deltas.keys(), "refused with its config"
    return plain, head


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
    if not with_head:
        _check_experts(path, config)
    merged = _MERGED if with_head else _MERGED | {_EXPERTS}
    for key in sorted(set(defaults) - merged - WITHOUT_EFFECT - _OF_THE_START):
        if (config[key] or None) != (defaults[key] or None):
            raise UserError(
                f"{path}: {key}: {config[key]!r} found, expected {defaults[key]!r}: only a plain LoRA can be merged "
                "faithfully"
            )
    return config


def _check_experts(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse adapters of parameters that are no routed experts', or are in an order that is not read here.

    Raises:
        UserError: names the field.
    """
    given = config[_EXPERTS]
    if not given:
        return
    if not isinstance(given, list) or not all(isinstance(name, str) and is_routed(name) for name in given):
        raise UserError(
            f"{path}: {_EXPERTS}: {given!r} found, expected names of routed experts' weights, such as "
            "experts.down_proj: adapters of other parameters are not merged"
        )
    if config["rank_pattern"] or config["alpha_pattern"]:
        raise UserError(
            f"{path}: {_EXPERTS}: {given!r} found beside rank_pattern or alpha_pattern, which are not read for experts"
        )
    version = config["peft_version"]
    if version is None or Version(str(version).partition("@")[0]) < _FIRST_OF_LAYOUT:
        raise UserError(
            f"{path}: {_EXPERTS}: the adapter was saved by PEFT {version or 'of an unknown version'}, which ordered "
            f"the adapters of experts in another way; expected {_FIRST_OF_LAYOUT} or later"
        )


def low_rank_of(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], *, label: str
) -> dict[str, LowRank | ExpertsLowRank]:
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
    found: dict[str, LowRank | ExpertsLowRank] = {}
    for module, pair in sides.items():
        both = set(pair) == {"A", "B"} and all(tensor.dim() == 2 for tensor in pair.values())
        if not both or pair["A"].shape[0] != pair["B"].shape[1]:
            shapes = {side: list(tensor.shape) for side, tensor in sorted(pair.items())}
            empty = any(tensor.numel() == 0 for tensor in pair.values())
            why = "; it was saved under ZeRO-3 without gathering its shards" if empty else ""
            raise UserError(f"{label}: {module}: found {shapes}, expected A of [rank, in] and B of [out, rank]{why}")
        rank = pair["A"].shape[0]
        asked = _of_pattern(config["rank_pattern"], module, config["r"])
        of_experts = _is_on_experts(module, config)
        if rank % asked if of_experts else rank != asked:
            each = " for each expert" if of_experts else ""
            raise UserError(f"{label}: {module} has rank {rank}, its config says {asked}{each}")
        alpha = _of_pattern(config["alpha_pattern"], module, config["lora_alpha"])
        scale = alpha / math.sqrt(asked) if config["use_rslora"] else alpha / asked
        for side, tensor in pair.items():
            if not tensor.is_floating_point():
                raise UserError(
                    f"{label}: {module}.lora_{side}: stored as {str(tensor.dtype).removeprefix('torch.')}: it is "
                    "quantised, and without its scale it is another number"
                )
            if not torch.isfinite(tensor.float()).all():  # torch has no isfinite of 8-bit numbers
                raise UserError(f"{label}: {module}.lora_{side}: not finite")
        if of_experts:
            a, b = pair["A"], pair["B"]
            by_expert = a.reshape(-1, asked, a.shape[1]), b.reshape(b.shape[0], asked, -1)
            found[f"{module}.weight"] = ExpertsLowRank(*by_expert, scale)
        else:
            found[f"{module}.weight"] = LowRank(pair["A"], pair["B"], scale)
    if not found:
        raise UserError(f"{label}: holds no adapter")
    if not any(low_rank.b.any() for low_rank in found.values()):
        raise UserError(f"{label}: every B is zero: this adapter was never trained")
    return found


def _is_on_experts(module: str, config: Mapping[str, Any]) -> bool:
    """Whether an adapter is of a weight among `target_parameters`; a module's second one wraps the first."""
    modules = {name.rpartition(".")[0] for name in config.get(_EXPERTS) or ()}
    own = without_wrappers(module)
    return any(own == name or own.endswith(f".{name}") for name in modules)


def _of_pattern(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """A module's value, matched as PEFT does: a key is the end of a module's name, or a regular expression for it."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default
