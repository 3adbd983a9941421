"""Decide what a run accepts, from the recipe and the model without weights, before anything is launched.

`uft train` and `uft plan` both use this decision, and `uft convert` can read back whatever it accepts. What depends on
more than the recipe, its DeepSpeed file and the model's config is checked by `run/checks.py`: other files, installed
packages, this machine.
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
from uft_ds.recipe.settings import Settings
from uft_ds.streams.adapter_files import PREFIX
from uft_ds.streams.adapters import add_adapters
from uft_ds.streams.classifier import empty_classifier
from uft_ds.streams.divided import why_undivided
from uft_ds.streams.experts import about_experts, expert_weight, is_on_experts
from uft_ds.streams.heads import plain_head
from uft_ds.streams.lanes import check_lockstep
from uft_ds.streams.load import attention_implementation
from uft_ds.streams.lora_config import is_plain_lora
from uft_ds.streams.policy import Policy, base_of
from uft_ds.streams.stored_names import converted_parameter
from uft_ds.streams.stream import POLICY_ADAPTER


def check_config(settings: Settings, config: Any, *, has_flash_attention: bool | None = None) -> None:
    """Refuse what the recipe, its DeepSpeed file and the model's config show, before the model is built.

    Args:
        settings: with the content of the DeepSpeed file.
        config: of the base.
        has_flash_attention: as for `attention_implementation`.
    Raises:
        UserError: names the recipe's key, and what to take.
    """
    attention = attention_implementation(
        settings.model.attention,
        getattr(torch, settings.model.dtype),
        config,
        has_flash_attention=has_flash_attention,
    )
    _check_divides(settings, config, attention)
    _check_not_on_disk(settings)
    check_positions(config, settings.data.max_length)
    limit = settings.generator.max_kl
    if settings.is_online and limit is not None and not settings.reference.is_needed:
        raise UserError(
            f"generator.max_kl: {limit:g} given, but no loss of this objective needs the reference, so the divergence "
            "is not known; leave it out"
        )


def check_forwarded(settings: Settings, policy: Policy) -> None:
    """Refuse a policy without weights whose layers or head do not allow what the recipe asks for.

    Args:
        policy: as `accepted_policy` or `whole_policy` returns it; not changed. A few of its layers are enough.
    Raises:
        UserError: names the recipe's key, and what to take.
    """
    base = base_of(policy)
    if settings.reference.mode == "lockstep":
        check_lockstep(base)
    if settings.trains_head:
        empty_classifier(base.config)


def _check_divides(settings: Settings, config: Any, attention: str) -> None:
    """Refuse a model whose rows cannot be divided as `launch.sequence_parallel` asks.

    Raises:
        UserError: names the key, and what cannot be divided.
    """
    size = settings.launch.sequence_parallel
    problem = None if size == 1 else why_undivided(config, attention, size)
    if problem is not None:
        raise UserError(f"launch.sequence_parallel: {size} given, but in this model {problem}")


def _check_not_on_disk(settings: Settings) -> None:
    """Refuse weights on a disk where DeepSpeed's buffers, which are of the model's type, are of no use or not tested.

    Raises:
        UserError: names the file, and what to take.
    """
    offloaded = settings.deepspeed.checked["zero_optimization"].get("offload_param")
    if not isinstance(offloaded, dict) or offloaded.get("device") != "nvme":
        return
    if settings.model.quantization is not None:
        raise UserError(
            f"model.quantization: {settings.model.quantization} given, but deepspeed: {settings.deepspeed.name} keeps "
            "the base on a disk (offload_param.device: nvme), which is for weights in 16 bits; take zero3_offload, or "
            "zero2, where each GPU holds all of it in 4 bits"
        )
    if settings.copies_reference:
        raise UserError(
            f"deepspeed: {settings.deepspeed.name}: zero_optimization.offload_param.device: 'nvme' found, expected "
            "'cpu' or 'none' where a copy of the base is the reference (reference.cache: false, reward_shift: kl or "
            "online sources with lora: null)"
        )


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
    converted = converted_parameter(base)
    if converted is not None:
        raise UserError(
            f"lora: null given, but the files of {type(base).__name__} hold {converted} in other tensors, which "
            "transformers converts when it loads them: all its parameters cannot be written back; train adapters"
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
