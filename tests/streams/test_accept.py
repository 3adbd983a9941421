"""What is refused before a launch: from the model without weights, in words that say what to do."""

from __future__ import annotations

import re
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mixtures import MIXTURES
from models import GPT2, LEAKS, PACKED, TARGETS
from tiny import CLASSES, rope_of
from transformers import BloomConfig, PretrainedConfig
from wrappers import WRAPPERS

from uft_ds.architectures.facts import (
    FAMILIES,
    decoder_layers,
    family_of,
    names_in_lockstep,
    reason_of_leak,
    shown_in_lockstep,
)
from uft_ds.errors import UserError
from uft_ds.planning.structure import Lora, structure_of
from uft_ds.streams.accept import accepted_policy, check_base_model, check_positions, whole_policy
from uft_ds.streams.load import empty_base

MODELS = PACKED | LEAKS | {"gpt2": GPT2}
WITHOUT_A_PLAIN_MLP = {"qwen2_moe", "qwen3_moe", "mixtral", "olmoe", "gpt_oss", "qwen3_next", "mamba"}
OF_EXPERTS = "; the routed experts get adapters by lora.experts: true, and the router stays frozen"
MLPS = ("mlp", "feed_forward", "mlp_block", "shared_mlp")


def policy_of(config: Any, targets: Any = "all-linear") -> Any:
    """Without weights, as `check_recipe` builds it."""
    return accepted_policy(empty_base(config), rank=4, alpha=8.0, targets=targets, dtype=torch.float32)


@pytest.mark.parametrize("name", FAMILIES)
def test_facts_are_those_of_the_model(name: str) -> None:
    """Of every family: the layers, their class and the final norm are where the table says; a leak is what the test of
    packed rows finds."""
    base, family = empty_base(MODELS[name]), FAMILIES[name]
    decoder = base.get_decoder()
    assert base.config.model_type == name
    assert decoder_layers(decoder) is getattr(decoder, family.layers)
    assert {type(layer).__name__ for layer in decoder_layers(decoder)} == {family.layer_class}
    assert getattr(decoder, family.norm).weight.shape == (64,)
    assert bool(family.leaks) == (name in LEAKS)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_of_a_wrapped_language_model_have_a_limit(kind: str) -> None:
    """Its rotary embeddings are in the config of the language model, not in the whole one's."""
    config = deepcopy(WRAPPERS["mistral3"])
    config.text_config.rope_parameters = rope_of(kind, 512)
    check_positions(config, 512)
    with pytest.raises(UserError, match=rf"^data.max_length: 513 is past the 512 positions of this model, .*'{kind}'"):
        check_positions(config, 513)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in WITHOUT_A_PLAIN_MLP])
def test_projections_of_the_mlp_are_those_of_the_model(name: str) -> None:
    """Weights of a layer's MLP over those of the projection that leads out of it, which is the last one."""
    layer = decoder_layers(empty_base(MODELS[name]).get_decoder())[-1]
    if name == "opt":  # it keeps both in the layer itself
        sizes = [layer.fc1.weight.numel(), layer.fc2.weight.numel()]
    else:
        (mlp,) = (module for at, module in layer.named_children() if at in MLPS)
        sizes = [parameter.numel() for parameter in mlp.parameters() if parameter.ndim == 2]
    assert FAMILIES[name].mlp_projections == sum(sizes) / sizes[-1]


@pytest.mark.parametrize("name", PACKED)
def test_a_family_that_packs_is_accepted(name: str) -> None:
    """With adapters on all linear layers, or on those that the refusal of these names."""
    assert policy_of(PACKED[name], TARGETS.get(name, "all-linear")).peft_config


@pytest.mark.parametrize("name", PACKED)
def test_all_parameters_are_trained_where_they_can_be_written_back(name: str) -> None:
    """Of every family but mixtures, whose experts the files hold one by one, and models of images."""
    refused = r"lora: null given, but the files of \w+ hold .*\.experts\." if name in MIXTURES else ""
    refused = refused or (r"lora: null given, but \w+ has parameters that no text reaches" if name in WRAPPERS else "")
    with pytest.raises(UserError, match=refused) if refused else nullcontext():
        assert all(parameter.requires_grad for parameter in whole_policy(empty_base(PACKED[name])).parameters())


@pytest.mark.parametrize("name", LEAKS)
def test_a_family_that_leaks_is_refused_by_name(name: str) -> None:
    """By a run and by a plan, with the same words."""
    config = LEAKS[name]
    with pytest.raises(
        UserError, match=r"model\.base: .* cannot be trained on packed rows: .*another architecture"
    ) as a:
        policy_of(config)
    assert type(empty_base(config)).__name__ in str(a.value)
    with pytest.raises(UserError) as b:
        structure_of(config, Lora(4, 8.0, "all-linear", "float32"))
    assert str(a.value) == str(b.value)


def test_an_unknown_layer_with_a_state_is_known_by_its_class() -> None:
    """A convolution along the row, or a name that says so; attention and MLP are neither."""
    unknown = PretrainedConfig()

    class SomeMambaMixer:
        pass

    assert family_of(unknown).layer_class == ""
    assert "SomeMambaMixer" in str(reason_of_leak(unknown, [torch.nn.Linear, SomeMambaMixer]))
    assert "Conv1d" in str(reason_of_leak(unknown, [torch.nn.Conv1d]))
    assert reason_of_leak(unknown, [torch.nn.Linear, torch.nn.LayerNorm]) is None


@pytest.mark.parametrize("name", [name for name in PACKED if name in TARGETS])
def test_adapters_on_experts_are_refused_with_targets_that_work(name: str) -> None:
    """PEFT adapts experts and router as parameters, which no merge reads back: the targets named are accepted."""
    with pytest.raises(UserError, match=r"lora\.targets: .*layers\.\*\.mlp\.experts.*uft convert") as refused:
        policy_of(PACKED[name])
    _, _, told = str(refused.value).rpartition("lora.targets=[")
    named, _, after = told.partition("]")
    assert after == OF_EXPERTS
    targets = named.split(",")
    assert targets == ["k_proj", "o_proj", "q_proj", "v_proj"]
    trained = [name for name, p in policy_of(PACKED[name], targets).named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 4 * 2


@pytest.mark.parametrize(
    "target", ["gate", "experts", "mlp.gate", "gate_up_proj", "experts.down_proj", "w1", "router", "mlp"]
)
@pytest.mark.parametrize("name", [name for name in PACKED if name in TARGETS])
def test_a_router_or_experts_as_targets_are_told_what_works(name: str, target: str) -> None:
    """Also by the names that other packages and files give them: the layers that may be named, and the key of the
    experts."""
    with pytest.raises(UserError) as refused:
        policy_of(PACKED[name], ["q_proj", target])
    message = str(refused.value)
    assert re.match(rf"lora\.targets: (no layer is called )?'{target}'", message)
    assert message.endswith(f"k_proj, o_proj, q_proj, v_proj{OF_EXPERTS}")


def test_a_dense_model_is_told_nothing_of_experts() -> None:
    """It has none."""
    with pytest.raises(UserError, match=r"no layer is called 'experts'.*v_proj$"):
        policy_of(PACKED["qwen2"], ["experts"])


def test_a_model_without_linear_layers_is_refused() -> None:
    """GPT-2 stores its layers transposed: a merge would add to the wrong entries."""
    with pytest.raises(UserError, match=r"lora\.targets: GPT2LMHeadModel has no linear layer that can be adapted"):
        policy_of(GPT2)


def test_layers_that_are_not_found_are_refused_with_every_name() -> None:
    """As many as are looked for: the message and the search have one list."""
    base = SimpleNamespace(get_decoder=torch.nn.Module)
    with pytest.raises(UserError, match=r"\(expected a list `layers` or `h` or `blocks` in Module\)"):
        check_base_model(base)


def test_a_dropout_of_zero_is_none() -> None:
    """BLOOM keeps one as a layer, another as a number: each is refused by its name only where it drops something."""
    sizes = {"vocab_size": 259, "hidden_size": 64, "n_layer": 1, "n_head": 4}
    assert empty_base(BloomConfig(**sizes)) is not None
    for key, where in (("attention_dropout", r"attention_dropout"), ("hidden_dropout", r"hidden_dropout")):
        with pytest.raises(UserError, match=rf"model\.base: .*{where} has a dropout of 0\.1, expected 0"):
            empty_base(BloomConfig(**sizes, **{key: 0.1}))


def test_lockstep_is_shown_for_the_families_that_are_tested() -> None:
    """Those of `tiny.py`, which `test_lanes.py` and `test_one_visit.py` run, and the mixtures of experts of
    `test_mixtures_of_experts.py`, and Qwen2.5-VL of `test_wrappers_of_images.py`."""
    tested = {*CLASSES, *MIXTURES, "qwen2_5_vl"}
    assert {name for name, family in FAMILIES.items() if family.lockstep} == tested
    assert shown_in_lockstep() == tuple(sorted(FAMILIES[name].layer_class for name in tested))


@pytest.mark.parametrize("place", ["docs/features.md", "docs/reference.md", "uft_ds/recipe/schema.py"])
def test_documentation_lists_the_families_of_lockstep(place: str) -> None:
    """Each by its name, where a reader looks before choosing a mode."""
    text = " ".join((Path(__file__).parents[2] / place).read_text(encoding="utf-8").split())
    assert ", ".join(names_in_lockstep()) in text
