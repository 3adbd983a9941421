"""Groups of parameters, each with its own learning rate: for example the adapters of several streams, a scalar head.

A recipe trains one group, its adapters or all parameters, or a reward model, whose head is a second one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

from torch import nn

ADAPTERS = "adapters"
"""Name of the only group if no groups are given."""

HEAD = "head"
"""Name of the group of a reward model's head."""


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate.

    rate_scale: factor of the run's learning rate, used if the group has no rate of its own.
    """

    name: str
    parameters: tuple[nn.Parameter, ...]
    rate_scale: float = 1.0


def one_group(model: nn.Module) -> tuple[ParameterGroup, ...]:
    """One group of all trainable parameters, in the model's order."""
    return (ParameterGroup(ADAPTERS, tuple(p for p in model.parameters() if p.requires_grad)),)


def check_groups(groups: Seq[ParameterGroup], model: nn.Module) -> None:
    """Check that the groups hold each trainable parameter exactly once, and nothing else.

    Raises:
        ValueError: two groups have one name, a group is empty, a frozen parameter is in a group, or a trainable one is
            in two groups or in none.
    """
    names = [group.name for group in groups]
    if len(set(names)) < len(names):
        raise ValueError(f"groups of parameters {names}: expected different names")
    if empty := [group.name for group in groups if not group.parameters]:
        raise ValueError(f"group {empty[0]}: it has no parameters; leave it out")
    of = [id(parameter) for group in groups for parameter in group.parameters]
    for name, parameter in model.named_parameters():
        found, expected = of.count(id(parameter)), int(parameter.requires_grad)
        if found != expected:
            what = "trained" if expected else "frozen"
            raise ValueError(f"{name} is {what}, and in {found} groups of parameters; expected {expected}")


def optimizer_groups(groups: Iterable[ParameterGroup]) -> list[dict[str, Any]]:
    """The groups in the form that torch's optimisers take, in the same order."""
    return [{"params": list(group.parameters), "name": group.name} for group in groups]


def rates_of(groups: Iterable[ParameterGroup], rates: float | Mapping[str, float]) -> dict[str, float]:
    """The learning rate of each group, by name.

    Args:
        rates: the run's rate, which is multiplied by each group's `rate_scale`; or the final rate of each group, by
            name.
    Raises:
        ValueError: a group has no rate, or a rate has no group.
    """
    scales = {group.name: group.rate_scale for group in groups}
    if not isinstance(rates, Mapping):
        return {name: rates * scale for name, scale in scales.items()}
    if scales.keys() != rates.keys():
        raise ValueError(f"rates of {sorted(rates)}, where the groups of parameters are {sorted(scales)}")
    return dict(rates)
