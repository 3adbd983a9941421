"""LoRA adapters on the frozen base: adding them, and choosing the one that a stream goes through."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from uft_ds.errors import UserError
from uft_ds.streams.lora_config import WITHOUT_EFFECT, read_lora_config
from uft_ds.streams.stream import BARE_BASE, POLICY_ADAPTER, REFERENCE_ADAPTER, Stream

Policy = PeftModel
"""The base with the policy's adapter, and others beside it: what checkpoints and training pass on."""


def add_adapters(
    base: Any,
    *,
    rank: int,
    alpha: float,
    targets: Literal["all-linear"] | list[str],
    dtype: torch.dtype,
    seed: int,
) -> PeftModel:
    """Freeze the base and add LoRA adapters, equal on every rank: A drawn from `seed`, B zero.

    Raises:
        UserError: the head would get an adapter, or a target is no linear layer of the model.
    """
    if targets != "all-linear":
        _check_targets(base, targets)
    torch.manual_seed(seed)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type] # PEFT only divides by it
        lora_dropout=0.0,
        target_modules=targets,
        bias="none",
        task_type="CAUSAL_LM",
    )
    try:
        policy = get_peft_model(base, config, autocast_adapter_dtype=False)
    except ValueError as error:
        raise UserError(f"lora.targets: {str(error).splitlines()[0]}") from None
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    assert not any(m.p > 0 for m in policy.modules() if isinstance(m, nn.Dropout)), "active dropout in the model"
    return policy


def _check_targets(base: Any, targets: list[str]) -> None:
    """PEFT passes over a misspelt name if another one matches, and takes embeddings too."""
    named, head = list(base.named_modules()), base.get_output_embeddings()
    linear = {name.split(".")[-1] for name, module in named if isinstance(module, nn.Linear) and module is not head}
    for target in targets:
        matches = [module for name, module in named if name == target or name.endswith(f".{target}")]
        if head in matches:
            raise UserError(
                "lora.targets: the head cannot have an adapter; its log-probs are computed from the frozen weight"
            )
        if not matches:
            raise UserError(f"lora.targets: no layer is called {target!r}; expected of {', '.join(sorted(linear))}")
        if not all(isinstance(module, nn.Linear) for module in matches):
            raise UserError(f"lora.targets: {target!r} is a {type(matches[0]).__name__}, expected linear layers")


def start_from_adapter(policy: PeftModel, folder: Path) -> None:
    """Put the adapter in `folder` beside the policy's as the frozen reference, and start the policy from it.

    Both then compute the same, operation by operation: log-ratios are exactly 0 before the first step.

    Raises:
        UserError: not a LoRA that a plain one of the recipe's rank, alpha and targets can take up.
    """
    tensors = _read_adapter(folder)
    ours: Any = policy.peft_config[POLICY_ADAPTER]
    _check_same_lora(folder, ours)
    expected = get_peft_model_state_dict(policy, adapter_name=POLICY_ADAPTER)
    for name in sorted(set(expected) ^ set(tensors)):
        where = "the policy has no adapter there" if name in tensors else "it is not in the file"
        raise UserError(f"reference.adapter: {folder}: {name}: {where}; lora.targets must name the same layers")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise UserError(
                f"reference.adapter: {folder}: {name} has shape {list(tensor.shape)}, "
                f"expected {list(expected[name].shape)}: it was trained on another model"
            )
    policy.add_adapter(REFERENCE_ADAPTER, ours, autocast_adapter_dtype=False)
    parameters = dict(policy.named_parameters())
    for name, tensor in tensors.items():
        for adapter in (POLICY_ADAPTER, REFERENCE_ADAPTER):
            parameter = parameters[name.removesuffix(".weight") + f".{adapter}.weight"]
            parameter.data = tensor.to(parameter.device, expected[name].dtype, copy=True)  # one each
            parameter.requires_grad = adapter == POLICY_ADAPTER


def _read_adapter(folder: Path) -> dict[str, Tensor]:
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        raise UserError(f"reference.adapter: {path}: no such file; expected an adapter in PEFT's format")
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"reference.adapter: {path}: cannot be read ({error})") from None


def lora_form(folder: Path) -> dict[str, Any]:
    """Of an adapter's config, what its numbers depend on besides its tensors.

    Raises:
        UserError: not a LoRA's config, one with fields that this PEFT does not know, or one that changes the base.
    """
    try:
        return _numbers_of(read_lora_config(folder / "adapter_config.json"))
    except UserError as error:
        raise UserError(f"reference.adapter: {error}") from None


def _numbers_of(config: dict[str, Any]) -> dict[str, Any]:
    # An empty pattern is {} or null, as the version has it.
    return {key: value or None for key, value in sorted(config.items()) if key not in WITHOUT_EFFECT}


def _check_same_lora(folder: Path, ours: PeftConfig) -> None:
    theirs, recipe_keys = lora_form(folder), {"r": "lora.rank", "lora_alpha": "lora.alpha"}
    for key, value in _numbers_of(ours.to_dict()).items():
        if theirs[key] != value:
            meant = recipe_keys.get(key, "a plain LoRA's")
            raise UserError(
                f"reference.adapter: {folder}: {key} is {theirs[key]!r}, expected {value!r} ({meant}): "
                "the policy starts from this adapter, so it must have the same form"
            )


def reference_of(policy: PeftModel) -> Stream:
    """The reference: the frozen adapter that `start_from_adapter` has put beside the policy's, else the bare base."""
    if REFERENCE_ADAPTER in policy.peft_config:
        return Stream(BARE_BASE.name, REFERENCE_ADAPTER)
    return BARE_BASE


@contextmanager
def as_stream(module: nn.Module, stream: Stream) -> Iterator[None]:
    """Within the block, `module` computes what the stream computes: the base with its adapter, or the bare base.

    PEFT's own `disable_adapter` and `set_adapter` also flip `requires_grad` of every adapter, which under ZeRO would
    reach its hooks; here only the two attributes that the layers' forward reads are set, and they come back after an
    exception too.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, LoraLayer)]
    before = [(layer._disable_adapters, layer._active_adapter) for layer in layers]
    for layer in layers:
        layer._disable_adapters = stream.adapter is None
        if stream.adapter is not None:
            layer._active_adapter = [stream.adapter]  # a layer that does not have it computes the base
    try:
        yield
    finally:
        for layer, (disabled, active) in zip(layers, before, strict=True):
            layer._disable_adapters, layer._active_adapter = disabled, active


def adapter_tensors(policy: Policy, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The policy's adapter by PEFT's names, of its parameters by their own names."""
    named: dict[str, Tensor] = get_peft_model_state_dict(policy, state_dict=dict(tensors), adapter_name=POLICY_ADAPTER)
    return named


def adapter_config_of(policy: Policy) -> bytes:
    """PEFT's adapter_config.json, as it saves it."""
    config: Any = policy.peft_config[POLICY_ADAPTER]
    inference_mode = config.inference_mode
    config.inference_mode = True
    try:
        with tempfile.TemporaryDirectory() as folder:
            config.save_pretrained(folder)
            return (Path(folder) / "adapter_config.json").read_bytes()
    finally:
        config.inference_mode = inference_mode
