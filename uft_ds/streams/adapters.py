"""LoRA adapters on the frozen base: add them, start from a given one, and select the one that a stream uses."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from uft_ds.architectures.facts import wraps_a_language_model
from uft_ds.errors import UserError
from uft_ds.objectives.reference import REFERENCE_STREAM
from uft_ds.streams.adapter_files import HEAD_TENSOR, PREFIX, read_adapter_tensors
from uft_ds.streams.classifier import HEAD
from uft_ds.streams.experts import about_experts, expert_parameters, expert_weight, is_on_experts
from uft_ds.streams.lora_config import WITHOUT_EFFECT, read_lora_config
from uft_ds.streams.policy import OF_POLICY, Policy
from uft_ds.streams.stream import BARE_BASE, POLICY_ADAPTER, REFERENCE_ADAPTER, REWARD, Stream

REWARD_HEAD = f"scores.{REWARD.name}.weight"
"""The name in `UFTModel` of a reward model's head."""


def add_adapters(
    base: Any,
    *,
    rank: int,
    alpha: float,
    targets: Literal["all-linear"] | list[str],
    dtype: torch.dtype,
    seed: int,
    experts: bool = False,
) -> PeftModel:
    """Freeze the base and add LoRA adapters, equal on every rank: A is drawn from `seed`, B is zero.

    Args:
        experts: whether a mixture's routed experts get adapters too; see `streams.experts`.
    Raises:
        UserError: the head would get an adapter, a target is not a linear layer of the model, the rank is larger
            than any layer can use, or there are no experts.
    """
    _check_rank(base, rank)
    if targets != "all-linear":
        _check_targets(base, targets)
    torch.manual_seed(seed)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type] # PEFT only divides by it
        lora_dropout=0.0,
        target_modules=targets,
        target_parameters=expert_parameters(base) if experts else None,
        bias="none",
        task_type="CAUSAL_LM",
        exclude_modules=_beside_the_decoder(base),
    )
    try:
        policy = get_peft_model(base, config, autocast_adapter_dtype=False)  # `dtype` is set below
    except ValueError as error:
        raise UserError(f"lora.targets: {str(error).splitlines()[0]}") from None
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    assert not any(m.p > 0 for m in policy.modules() if isinstance(m, nn.Dropout)), "active dropout in the model"
    return policy


def _beside_the_decoder(base: Any) -> str | None:
    """A pattern of all modules outside of a wrapper's language model, which no text reaches; None for other models."""
    if not wraps_a_language_model(base.config):
        return None
    decoder = base.get_decoder()
    (place,) = (name for name, module in base.named_modules() if module is decoder)
    return rf"(?!{re.escape(place)}\.).*"


def _check_rank(base: Any, rank: int) -> None:
    """Refuse a rank above the smaller side of every layer. PEFT would ask for its memory first."""
    sides = [min(m.in_features, m.out_features) for m in base.modules() if isinstance(m, nn.Linear)]
    if sides and rank > max(sides):
        raise UserError(f"lora.rank: {rank} given, but no layer of this model can use more than {max(sides)}")


def _check_targets(base: Any, targets: list[str]) -> None:
    """Check each target: PEFT ignores a misspelt name if another one matches, and it accepts embeddings too."""
    beside, head = _beside_the_decoder(base), base.get_output_embeddings()
    named = [
        (name, module)
        for name, module in base.named_modules()
        if module is head or beside is None or not re.fullmatch(beside, name)
    ]
    linear = {name.split(".")[-1] for name, module in named if isinstance(module, nn.Linear) and module is not head}
    those = f"{', '.join(sorted(linear))}{about_experts(base)}"
    for target in targets:
        matches = [module for name, module in named if name == target or name.endswith(f".{target}")]
        if head in matches:
            raise UserError(
                "lora.targets: the head cannot have an adapter; its log-probs are computed from the frozen weight"
            )
        if not matches:
            raise UserError(f"lora.targets: no layer is called {target!r}; expected one of {those}")
        other = next((module for module in matches if not isinstance(module, nn.Linear)), None)
        if other is not None:
            raise UserError(
                f"lora.targets: {target!r} is a {type(other).__name__}, expected linear layers, such as {those}"
            )


def start_from_adapter(policy: PeftModel, folder: Path) -> None:
    """Load the adapter in `folder` twice: as the frozen reference, and as the policy's start.

    Both then run the same operations on equal numbers, so log-ratios are exactly 0 before the first step.

    Raises:
        UserError: the adapter does not have the form of a plain LoRA with the recipe's rank, alpha and targets, or
            holds values that are not finite.
    """
    _load(policy, folder, (POLICY_ADAPTER, REFERENCE_ADAPTER), "reference.adapter")


def start_policy_from_adapter(policy: PeftModel, folder: Path) -> None:
    """Load the adapter in `folder` as the policy's start; the reference stays the bare base.

    Raises:
        UserError: as `start_from_adapter`.
    """
    _load(policy, folder, (POLICY_ADAPTER,), "start.adapter")


def _load(policy: PeftModel, folder: Path, adapters: tuple[str, ...], recipe_key: str) -> None:
    tensors = _read_adapter(folder, recipe_key)
    ours: Any = policy.peft_config[POLICY_ADAPTER]
    _check_same_lora(folder, ours, recipe_key)
    expected = get_peft_model_state_dict(policy, adapter_name=POLICY_ADAPTER)
    for name in sorted(set(expected) ^ set(tensors)):
        where = "the policy has no adapter there" if name in tensors else "it is not in the file"
        beside = _beside_the_decoder(policy.get_base_model())
        if name in tensors and beside is not None and re.fullmatch(beside, name.removeprefix(PREFIX)):
            raise UserError(
                f"{recipe_key}: {folder}: {name}: it adapts what reads images, which is not trained here; merge the "
                "adapter (uft convert) and take the result as model.base"
            )
        raise UserError(f"{recipe_key}: {folder}: {name}: {where}; lora.targets must name the same layers")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise UserError(
                f"{recipe_key}: {folder}: {name} has shape {list(tensor.shape)}, "
                f"expected {list(expected[name].shape)}: it was trained on another model"
            )
        if not torch.isfinite(tensor).all():
            raise UserError(
                f"{recipe_key}: {folder}: {name} holds NaN or infinity; the file is damaged, or its training diverged: "
                "take another checkpoint"
            )
    if REFERENCE_ADAPTER in adapters:
        policy.add_adapter(REFERENCE_ADAPTER, ours, autocast_adapter_dtype=False)
    parameters = dict(policy.named_parameters())
    for name, tensor in tensors.items():
        for adapter in adapters:
            parameter = parameters[name.removesuffix(".weight") + f".{adapter}.weight"]
            # Without copy=True, `to` may return the same storage for both adapters, and training the policy would
            # change the reference.
            parameter.data = tensor.to(parameter.device, expected[name].dtype, copy=True)
            parameter.requires_grad = adapter == POLICY_ADAPTER


def _read_adapter(folder: Path, recipe_key: str) -> dict[str, Tensor]:
    try:
        return read_adapter_tensors(folder)
    except UserError as error:
        raise UserError(f"{recipe_key}: {error}") from None


def lora_form(folder: Path, recipe_key: str = "reference.adapter") -> dict[str, Any]:
    """The fields of an adapter's config that its output depends on, besides its tensors.

    Args:
        recipe_key: what messages call the adapter.
    Raises:
        UserError: the config is not a LoRA's, has fields that the installed PEFT does not know, or changes the base.
    """
    try:
        return _numbers_of(read_lora_config(folder / "adapter_config.json"))
    except UserError as error:
        raise UserError(f"{recipe_key}: {error}") from None


def _numbers_of(config: dict[str, Any]) -> dict[str, Any]:
    # PEFT writes an empty pattern as {} or as null, depending on its version, and lists in the order of a set.
    numbers = {key: value or None for key, value in sorted(config.items()) if key not in WITHOUT_EFFECT}
    return {key: sorted(value) if isinstance(value, list | set) else value for key, value in numbers.items()}


def _check_same_lora(folder: Path, ours: PeftConfig, recipe_key: str) -> None:
    theirs, recipe_keys = lora_form(folder, recipe_key), {"r": "lora.rank", "lora_alpha": "lora.alpha"}
    if theirs["modules_to_save"] == [HEAD]:
        raise UserError(f"{recipe_key}: {folder}: the adapter of a reward model, with its head; no run starts from one")
    for key, value in _numbers_of(ours.to_dict()).items():
        if theirs[key] != value:
            if key == "target_parameters":
                raise UserError(f"{recipe_key}: {folder}: {_other_experts(theirs[key], value)}")
            meant = recipe_keys.get(key, "a plain LoRA's")
            raise UserError(
                f"{recipe_key}: {folder}: {key} is {theirs[key]!r}, expected {value!r} ({meant}): "
                "the policy starts from this adapter, so it must have the same form"
            )


def _other_experts(theirs: list[str] | None, ours: list[str] | None) -> str:
    """How an adapter differs in its `target_parameters`, which are `lora.experts` in a recipe, and what to do."""
    found = "no experts" if theirs is None else f"experts ({', '.join(theirs)})"
    if ours is None:
        found, remedy = f"{found}, but lora.experts is false", "set lora.experts: true"
    elif theirs is None:
        found, remedy = f"{found}, but lora.experts is true", "leave lora.experts out"
    else:
        remedy = f"with lora.experts: true, {', '.join(ours)} are adapted; take an adapter of these"
    return f"it adapts {found}: the policy starts from this adapter, so it must have the same form; {remedy}"


def reference_of(policy: Policy) -> Stream:
    """The reference stream: the frozen adapter that `start_from_adapter` has loaded, or else the bare base."""
    if isinstance(policy, PeftModel) and REFERENCE_ADAPTER in policy.peft_config:
        return Stream(REFERENCE_STREAM, REFERENCE_ADAPTER)
    return BARE_BASE


@contextmanager
def as_stream(module: nn.Module, stream: Stream) -> Iterator[None]:
    """Within the block, `module` computes what the stream computes: the base with its adapter, or the bare base.

    PEFT's own `disable_adapter` and `set_adapter` also change `requires_grad` of every adapter, which would affect
    ZeRO's hooks. Here only the two attributes that the layers' forward reads are set. They are restored after the
    block, also after an exception.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, LoraLayer)]
    before = [(layer._disable_adapters, layer._active_adapter) for layer in layers]
    for layer in layers:
        layer._disable_adapters = stream.adapter is None
        if stream.adapter is not None:
            layer._active_adapter = [stream.adapter]  # a layer without this adapter computes the base
    try:
        yield
    finally:
        for layer, (disabled, active) in zip(layers, before, strict=True):
            layer._disable_adapters, layer._active_adapter = disabled, active


def adapted_weights(policy: PeftModel) -> tuple[str, ...]:
    """Names of the base's weights that have an adapter, as they are without adapters."""
    layers = ((name.removeprefix(PREFIX), one) for name, one in policy.named_modules() if isinstance(one, LoraLayer))
    return tuple(expert_weight(name, one) if is_on_experts(one) else f"{name}.weight" for name, one in layers)


def adapter_tensors(policy: PeftModel, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The policy's adapter by PEFT's names, and with it the head of a reward model.

    Args:
        trained: all trained parameters by their names in `UFTModel`.
    """
    of_policy = {name.removeprefix(OF_POLICY): tensor for name, tensor in trained.items()}
    named: dict[str, Tensor] = get_peft_model_state_dict(policy, state_dict=of_policy, adapter_name=POLICY_ADAPTER)
    head = {HEAD_TENSOR: trained[REWARD_HEAD]} if REWARD_HEAD in trained else {}
    return named | head


def adapter_config_of(policy: PeftModel, *, with_head: bool = False) -> bytes:
    """PEFT's adapter_config.json, as it saves it, but with its lists of names sorted.

    With the head of a reward model, it is the config of a sequence classifier's adapter. PEFT writes names in the order
    of a set, which differs from process to process.

    In a wrapper for images the layers are named whole. The ends of their names are those of layers that read images,
    too, and only `exclude_modules` would keep these out, which older versions of PEFT and other readers do not know.
    """
    config: Any = policy.peft_config[POLICY_ADAPTER]
    inference_mode = config.inference_mode
    config.inference_mode = True
    try:
        with tempfile.TemporaryDirectory() as folder:
            config.save_pretrained(folder)
            stored = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
    finally:
        config.inference_mode = inference_mode
    if wraps_a_language_model(policy.get_base_model().config):
        stored |= {"target_modules": _adapted_layers(policy), "exclude_modules": None}
    if with_head:
        stored |= {"task_type": "SEQ_CLS", "modules_to_save": [HEAD]}
    for key in ("target_modules", "target_parameters"):
        if isinstance(stored.get(key), list):
            stored[key].sort()
    return json.dumps(stored, indent=2, sort_keys=True).encode()


def _adapted_layers(policy: PeftModel) -> list[str]:
    """The layers with the policy's adapter, by their names in the base."""
    layers = ((name.removeprefix(PREFIX), one) for name, one in policy.named_modules() if isinstance(one, LoraLayer))
    return [name for name, one in layers if POLICY_ADAPTER in one.r]
