"""Groups of parameters: they divide what is trained, and each has its rate."""

import pytest
from torch import nn

from uft_ds.engine.groups import ADAPTERS, ParameterGroup, check_groups, one_group, rates_of


@pytest.fixture
def model() -> nn.Module:
    layers = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    layers[0].bias.requires_grad_(False)
    return layers


def test_one_group_holds_all_that_is_trained(model: nn.Module) -> None:
    """In the model's order, without what is frozen."""
    (group,) = one_group(model)
    assert group.name == ADAPTERS
    assert [id(p) for p in group.parameters] == [id(p) for p in model.parameters() if p.requires_grad]
    check_groups([group], model)


def test_groups_that_do_not_divide_the_model_are_refused(model: nn.Module) -> None:
    """A parameter in two groups or in none, a frozen one, an empty group, a name given twice."""
    whole = one_group(model)[0].parameters
    for groups, message in (
        ([ParameterGroup("a", whole), ParameterGroup("b", whole[:1])], r"0\.weight is trained, and in 2 groups"),
        ([ParameterGroup("a", whole[1:])], r"0\.weight is trained, and in 0 groups"),
        ([ParameterGroup("a", (*whole, model[0].bias))], r"0\.bias is frozen, and in 1 groups"),
        ([ParameterGroup("a", whole), ParameterGroup("b", ())], "group b: it has no parameters"),
        ([ParameterGroup("a", whole), ParameterGroup("a", whole)], "expected different names"),
    ):
        with pytest.raises(ValueError, match=message):
            check_groups(groups, model)


def test_each_group_has_its_rate() -> None:
    """The run's rate is scaled, rates by name are taken as they are, and 1 leaves a rate bit for bit."""
    groups = [ParameterGroup("policy", ()), ParameterGroup("value", (), rate_scale=10.0)]
    assert rates_of(groups, 0.1 + 0.2) == {"policy": 0.1 + 0.2, "value": 10.0 * (0.1 + 0.2)}
    assert rates_of(groups, {"policy": 1.0, "value": 3.0}) == {"policy": 1.0, "value": 3.0}


@pytest.mark.parametrize("rates", [{"policy": 1.0}, {"policy": 1.0, "value": 1.0, "other": 1.0}, {}])
def test_rates_must_name_the_groups(rates: dict[str, float]) -> None:
    """A group that no rate is given for would keep the one of the step before."""
    with pytest.raises(ValueError, match="where the groups of parameters are"):
        rates_of([ParameterGroup("policy", ()), ParameterGroup("value", ())], rates)
