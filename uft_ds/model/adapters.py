"""LoRA adapters on the frozen base: adding them, and looking past them at the reference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from uft_ds.errors import UserError


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


@contextmanager
def adapters_off(module: nn.Module) -> Iterator[None]:
    """Within the block, `module` computes what the bare base computes.

    PEFT's own `disable_adapter` also flips `requires_grad` of every adapter, which under ZeRO would reach its
    hooks; here only the flag that the layers' forward reads is set, and it comes back after an exception too.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer._disable_adapters = value
