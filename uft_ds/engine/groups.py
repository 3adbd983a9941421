"""Groups of parameters with learning rates of their own: adapters of several streams, a scalar head."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

from torch import nn

ADAPTERS = "adapters"
"""The one group where nobody asks for others."""


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate.

    rate_scale: what the run's learning rate is multiplied by, where the group is not given a rate of its own.
    """

    name: str
    parameters: tuple[nn.Parameter, ...]
    rate_scale: float = 1.0


def one_group(model: nn.Module) -> tuple[ParameterGroup, ...]:
    """All that is trained of a model, in its own order."""
    return (ParameterGroup(ADAPTERS, tuple(p for p in model.parameters() if p.requires_grad)),)


def check_groups(groups: Seq[ParameterGroup], model: nn.Module) -> None:
    """Refuse groups that do not divide what is trained.

    Raises:
        ValueError: a name stands twice, a group is empty, or a parameter is frozen, in two groups or in none.
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
    """As torch's optimisers take them, in the same order."""
    return [{"params": list(group.parameters), "name": group.name} for group in groups]


def rates_of(groups: Iterable[ParameterGroup], rates: float | Mapping[str, float]) -> dict[str, float]:
    """The learning rate of each group.

    Args:
        rates: the run's, which each group scales; or each group's own by name, taken as it is.
    Raises:
        ValueError: a group without a rate, or a rate without a group.
    """
    scales = {group.name: group.rate_scale for group in groups}
    if not isinstance(rates, Mapping):
        return {name: rates * scale for name, scale in scales.items()}
    if scales.keys() != rates.keys():
        raise ValueError(f"rates of {sorted(rates)}, where the groups of parameters are {sorted(scales)}")
    return dict(rates)
