"""A reward model beside the policy: its LoRA adapter on the policy's base, with rank, alpha and layers of its own.

It is read from the folder of an adapter in PEFT's format that holds the head too (`modules_to_save: ["score"]`): of a
checkpoint of `objective.reward: head`, or what `uft convert --to adapter` writes of one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from uft_ds.errors import UserError
from uft_ds.streams.adapter_files import CONFIG, HEAD_TENSOR, PREFIX, read_adapter_tensors
from uft_ds.streams.classifier import HEAD
from uft_ds.streams.lora_config import LORA_TENSOR, WITHOUT_EFFECT, read_lora_config
from uft_ds.streams.stream import REWARD_ADAPTER

_PATTERNS = ("rank_pattern", "alpha_pattern")
_OWN = ("r", "lora_alpha", "use_rslora", *_PATTERNS)
"""Fields of a LoRA's config that may be others than the policy's."""
_OF_THE_START = ("loftq_config", "corda_config", "ensure_weight_tying", "modules_to_save")
"""Fields that only record how an adapter was made, and the one that says that there is a head."""


def add_reward_adapter(policy: PeftModel, folder: Path, recipe_key: str, *, dtype: torch.dtype) -> Tensor:
    """Load the adapter in `folder` beside the policy's, frozen; nothing of the policy changes, nor torch's generator.

    Args:
        recipe_key: what messages call the adapter.
        dtype: of the adapter in memory: DeepSpeed keeps one type for all adapters. The head stays in float32.
    Returns:
        The head: [1, hidden], float32, on the host.
    Raises:
        UserError: the adapter is not a plain LoRA with a head, was never trained, is not finite, or is of other layers
            than the base has.
    """
    try:
        config, tensors = read_lora_config(folder / CONFIG), read_adapter_tensors(folder)
        head = _head_of(tensors, folder)
        _check_is_plain(config, folder)
        modules = _modules_of(tensors, folder)
        _check_layers(policy.get_base_model(), modules, folder)
    except UserError as error:
        raise UserError(f"{recipe_key}: {error}") from None
    given: dict[str, Any] = {key: config[key] or {} if key in _PATTERNS else config[key] for key in _OWN}
    own = LoraConfig(
        **given,
        target_modules=modules,  # by their whole names: PEFT then adapts these layers and no others
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    trained = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    # PEFT draws what is overwritten below: the numbers that the run draws must not depend on it.
    with torch.random.fork_rng(devices=[]):
        policy.add_adapter(REWARD_ADAPTER, own, autocast_adapter_dtype=False)
    parameters = {_as_saved(name): p for name, p in policy.named_parameters() if f".{REWARD_ADAPTER}." in name}
    assert set(parameters) == set(tensors), "PEFT adapts the layers that it is told to"
    for name, parameter in parameters.items():
        tensor = tensors[name]
        if tensor.shape != parameter.shape:
            raise UserError(
                f"{recipe_key}: {folder}: {name} has shape {list(tensor.shape)}, expected {list(parameter.shape)}: it "
                "was trained on another model"
            )
        parameter.data = tensor.to(parameter.device, dtype, copy=True)
    # Where an adapter is added to a layer, some versions of PEFT change what else of it is trained.
    for name, parameter in policy.named_parameters():
        parameter.requires_grad = name in trained
    return head


def _as_saved(name: str) -> str:
    return name.replace(f".{REWARD_ADAPTER}.", ".")


def _head_of(tensors: dict[str, Tensor], folder: Path) -> Tensor:
    """Take the head out of an adapter's tensors."""
    head = tensors.pop(HEAD_TENSOR, None)
    if head is None:
        raise UserError(
            f"{folder}: holds no {HEAD_TENSOR}, the head of a reward model; expected a run of objective.reward: head, "
            "one of its checkpoints, or what `uft convert --to adapter` writes of it"
        )
    if head.dim() != 2 or head.shape[0] != 1 or not torch.isfinite(head.float()).all():
        raise UserError(f"{folder}: {HEAD_TENSOR}: {list(head.shape)}, expected a finite head, [1, hidden]")
    return head.float()


def _check_is_plain(config: Mapping[str, Any], folder: Path) -> None:
    if config["modules_to_save"] != [HEAD]:
        raise UserError(f"{folder / CONFIG}: modules_to_save: {config['modules_to_save']!r} found, expected ['{HEAD}']")
    defaults = LoraConfig().to_dict()
    for key in sorted(set(defaults) - WITHOUT_EFFECT - {*_OWN, *_OF_THE_START}):
        if (config[key] or None) != (defaults[key] or None):
            raise UserError(
                f"{folder / CONFIG}: {key}: {config[key]!r} found, expected {defaults[key]!r}: only a plain LoRA can "
                "be a stream beside the policy; merge it into its base and give the whole model"
            )


def _modules_of(tensors: Mapping[str, Tensor], folder: Path) -> list[str]:
    """The names of the layers that have an adapter, as they are in the base."""
    modules: set[str] = set()
    for name, tensor in tensors.items():
        match = LORA_TENSOR.fullmatch(name)
        if match is None:
            raise UserError(f"{folder}: {name}: not part of a plain LoRA with a head")
        if not torch.isfinite(tensor.float()).all():
            raise UserError(f"{folder}: {name} holds NaN or infinity; take another checkpoint")
        modules.add(match["module"].removeprefix(PREFIX))
    expected = {f"{PREFIX}{module}.lora_{side}.weight" for module in modules for side in "AB"}
    if set(tensors) != expected or not modules:
        lacking = min(expected - set(tensors), default="every lora_A and lora_B")
        raise UserError(f"{folder}: holds no {lacking}; the file is damaged: fetch it again")
    if not any(tensor.any() for name, tensor in tensors.items() if ".lora_B." in name):
        raise UserError(f"{folder}: every lora_B is zero: this reward model was never trained; take a later checkpoint")
    return sorted(modules)


def _check_layers(base: Any, modules: list[str], folder: Path) -> None:
    found, head = dict(base.named_modules()), base.get_output_embeddings()
    for name in modules:
        module = found.get(name)
        if not isinstance(module, nn.Linear | LoraLayer):
            what = "has no such layer" if module is None else f"is a {type(module).__name__} there"
            raise UserError(f"{folder}: {name}: model.base {what}: the reward model was trained on another model")
        if module is head:
            raise UserError(f"{folder}: {name}: an adapter on the language model's head, which no reward reads")
