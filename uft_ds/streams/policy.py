"""What a run trains: a frozen base with adapters (`Adapted`), or all parameters of the base."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

Adapted = PeftModel
"""The frozen base with the policy's adapter, and others beside it."""

Policy = PeftModel | PreTrainedModel
"""What checkpoints and training pass on: a base with adapters, or one that is trained itself."""

OF_POLICY = "policy."
"""What `UFTModel` puts before the names of the policy's parameters."""


def base_of(policy: Any) -> Any:
    """Hugging Face's model in a policy."""
    return policy.get_base_model() if isinstance(policy, PeftModel) else policy


def adapted(policy: Policy) -> Adapted:
    """The policy of a run that trains adapters.

    Raises:
        TypeError: it has none.
    """
    if not isinstance(policy, PeftModel):
        raise TypeError(f"{type(policy).__name__} has no adapters")
    return policy


def trains_all(policy: Any) -> bool:
    """Whether all parameters are trained: once training has begun, the policy's weights no longer compute the base."""
    return not isinstance(policy, PeftModel)
