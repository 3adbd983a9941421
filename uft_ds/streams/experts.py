"""Adapters of a mixture's routed experts, whose weights transformers holds as one three-dimensional parameter.

PEFT (0.21) wraps a parameter W: [experts, out, in], and computes W + scale * B A of all experts in every forward, in
W's type. Two parameters of one module are two wrappers, one inside the other. A: [experts * rank, in] is ordered by
experts, B: [out, rank * experts] by rank; before 0.19 it was another order.
"""

from __future__ import annotations

import re
from typing import Any, TypeGuard

from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor

from uft_ds.architectures.facts import adapts_experts, is_routed, names_with_experts
from uft_ds.errors import UserError

_INSIDE = re.compile(r"\.base_layer\b")


def expert_parameters(base: Any) -> list[str]:
    """What PEFT is given as `target_parameters`: the routed experts' weights, by the ends of their names.

    Raises:
        UserError: the model has no routed experts, or its experts are not shown to be merged.
    """
    routed = [name for name, parameter in base.named_parameters() if is_routed(name) and parameter_dim(parameter) == 3]
    if not routed:
        raise UserError(f"lora.experts: true given, but {type(base).__name__} has no routed experts; leave it out")
    if not adapts_experts(base.config):
        raise UserError(
            f"lora.experts: true given, but adapters of the experts of {type(base).__name__} have not been shown to be "
            f"merged (shown: {', '.join(names_with_experts())}); leave it out"
        )
    return sorted({".".join(name.split(".")[-2:]) for name in routed})


def about_experts(base: Any) -> str:
    """What a message about `lora.targets` adds for a mixture: how its experts get adapters; empty for other models."""
    if not any(is_routed(name) for name, _ in base.named_parameters()):
        return ""
    if adapts_experts(base.config):
        return "; the routed experts get adapters by lora.experts: true, and the router stays frozen"
    return "; the routed experts and the router stay frozen"


def parameter_dim(parameter: Tensor) -> int:
    """The dimensions of a parameter, also where ZeRO-3 has taken its values away."""
    return len(getattr(parameter, "ds_shape", parameter.shape))


def is_on_experts(module: Any) -> TypeGuard[ParamWrapper]:
    """Whether a layer of PEFT's adapts routed experts."""
    return isinstance(module, ParamWrapper)


def without_wrappers(name: str) -> str:
    """A module's name as it is without adapters."""
    return _INSIDE.sub("", name)


def expert_weight(name: str, module: ParamWrapper) -> str:
    """The parameter that a wrapper adapts, by its name without adapters."""
    return f"{without_wrappers(name)}.{module.parameter_name}"
