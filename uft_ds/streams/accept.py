"""Decide which models a run accepts, from the model without weights, before anything is launched.

`uft train` and `uft plan` both use this decision, and `uft convert` can read back whatever it accepts.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, Literal

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from uft_ds.architectures.facts import (
    LAYERS,
    decoder_layers,
    is_routed,
    layers_attribute,
    positions_limit,
    reason_of_leak,
)
from uft_ds.errors import UserError
from uft_ds.streams.adapter_files import PREFIX
from uft_ds.streams.adapters import add_adapters
from uft_ds.streams.experts import about_experts, expert_weight, is_on_experts
from uft_ds.streams.heads import plain_head
from uft_ds.streams.lora_config import is_plain_lora
from uft_ds.streams.stream import POLICY_ADAPTER


def accepted_policy(
    base: Any,
    *,
    rank: int,
    alpha: float,
    targets: Literal["all-linear"] | list[str],
    dtype: torch.dtype,
    experts: bool = False,
) -> PeftModel:
    """The policy of a run without weights: a base that can be trained, and adapters that `uft convert` can read back.

    Args:
        base: the base model on the meta device.
        experts: whether a mixture's routed experts get adapters too.
    Raises:
        UserError: `model.base` or `lora.targets` cannot be trained; the message says why, and what to do.
    """
    check_base_model(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT uses a property that transformers deprecates
        # PEFT warns when it sets fan_in_fan_out for transposed layers, which `check_adapters` refuses.
        warnings.filterwarnings("ignore", message="fan_in_fan_out", category=UserWarning)
        # PEFT warns of adapters on experts, which are refused too.
        warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern", category=RuntimeWarning)
        policy = add_adapters(base, rank=rank, alpha=alpha, targets=targets, dtype=dtype, seed=0, experts=experts)
    check_adapters(policy, experts=experts)
    return policy


def check_base_model(base: Any) -> None:
    """Refuse a base whose layers cannot be found, or whose packed sequences would affect each other.

    Raises:
        UserError: the message names `model.base` and the model's class.
    """
    decoder, name = base.get_decoder(), type(base).__name__
    if layers_attribute(decoder) is None:
        known = " or ".join(f"`{attribute}`" for attribute in LAYERS)
        raise UserError(
            f"model.base: {name} keeps its decoder layers where neither ZeRO-3 nor a plan finds them "
            f"(expected a list {known} in {type(decoder).__name__}); take a model of another architecture"
        )
    plain_head(base)
    layers = decoder_layers(decoder)
    reason = reason_of_leak(decoder.config, {type(module) for module in layers.modules()})
    if reason is not None:
        raise UserError(
            f"model.base: {name} cannot be trained on packed rows: {reason}, so sequences that share a row would "
            "change each other's log-probs; take a model of another architecture"
        )


def whole_policy(base: Any) -> Any:
    """The policy without weights of a run that trains all parameters of a base.

    Raises:
        UserError: `model.base` cannot be trained so; the message says why, and what to do.
    """
    check_base_model(base)
    of_text = {id(p) for part in (base.get_decoder(), base.get_output_embeddings()) for p in part.parameters()}
    outside = next((name for name, parameter in base.named_parameters() if id(parameter) not in of_text), None)
    if outside is not None:
        raise UserError(
            f"lora: null given, but {type(base).__name__} has parameters that no text reaches, such as {outside}; "
            "train adapters, or take a model of text alone"
        )
    base.requires_grad_(True)
    return base


def check_positions(config: Any, max_length: int) -> None:
    """Refuse lengths past the limit of dynamic and LongRoPE rotary embeddings.

    Beyond it they scale their frequencies by the longest sequence in the batch, so packing would change every
    sequence's result, and so would the number of turns of a conversation.

    Raises:
        UserError: the message names `data.max_length` and the limit.
    """
    found = positions_limit(config)
    if found is not None and max_length > found[1]:
        kind, limit = found
        raise UserError(
            f"data.max_length: {max_length} is past the {limit} positions of this model, whose {kind!r} rotary "
            f"embeddings then change with the longest sequence of a micro-batch; expected at most {limit}"
        )


def check_adapters(policy: PeftModel, *, experts: bool = False) -> None:
    """Refuse adapters that `uft convert` cannot merge: every trained parameter must be a plain LoRA of a linear layer.

    With `all-linear` PEFT also adapts the experts and the router of a mixture of experts, as parameters
    (`target_parameters`).

    Args:
        experts: accept adapters of routed experts too, but not of the router.
    Raises:
        UserError: the message names `lora.targets`, the layers, and targets that work.
    """
    refused = sorted(set(_not_plain(policy, experts=experts)))
    if not refused:
        return
    names = _plain_targets(policy)
    what = f"{', '.join(refused[:3])}{f' and {len(refused) - 3} more' if len(refused) > 3 else ''}"
    model = type(policy.get_base_model()).__name__
    if not names:
        raise UserError(
            f"lora.targets: {model} has no linear layer that can be adapted: adapters of {what} cannot be merged by "
            "`uft convert`; take a model of another architecture"
        )
    raise UserError(
        f"lora.targets: in {model} it adapts {what}, which is not a plain LoRA of a linear layer and cannot be "
        f"merged by `uft convert`; set lora.targets=[{','.join(names)}]{about_experts(policy.get_base_model())}"
    )


def _not_plain(policy: PeftModel, *, experts: bool) -> Iterator[str]:
    """Names of modules with trained parameters that are neither a plain LoRA of an `nn.Linear`, nor one of experts."""
    config: Any = policy.peft_config[POLICY_ADAPTER]
    of_experts: set[str] = set()
    for name, module in policy.named_modules():
        if experts and is_on_experts(module) and is_routed(expert_weight(name, module)):
            of_experts.add(name)
        elif isinstance(module, LoraLayer) and not isinstance(module.get_base_layer(), nn.Linear):
            yield _shown(name)
    for name, parameter in policy.named_parameters():
        module = name.partition(".lora_")[0]
        if parameter.requires_grad and not (module in of_experts or is_plain_lora(name, parameter.shape, config.r)):
            yield _shown(module)


def _shown(name: str) -> str:
    """A module's name for messages: without PEFT's prefix, with `*` for the layer's number."""
    parts = name.removeprefix(PREFIX).removesuffix(".base_layer").split(".")
    return ".".join("*" if part.isdigit() else part for part in parts)


def _plain_targets(policy: PeftModel) -> list[str]:
    """Last name components of the decoder layers' linear modules, except those that other modules also have."""
    base: Any = policy.get_base_model()
    plain: set[str] = set()
    other: set[str] = set()
    for name, module in decoder_layers(base.get_decoder()).named_modules():
        own = module.get_base_layer() if isinstance(module, LoraLayer) else module
        (plain if isinstance(own, nn.Linear) else other).add(name.rpartition(".")[2])
    return sorted(plain - other - {"base_layer", "default"})
