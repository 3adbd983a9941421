"""A base in NF4: what is refused before anything is launched, and what its identity holds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from mixtures import TARGETS, build_mixture
from recipes import refusal
from runs import settings_of_run, write_recipe
from safetensors.torch import load_file, save_file
from tiny import build_tiny_model
from toy import saved_adapter

from uft_ds.engine.deepspeed_file import with_deepspeed_file
from uft_ds.errors import UserError
from uft_ds.export.quantised import nf4_of, write_mark
from uft_ds.recipe.to_settings import changed
from uft_ds.run.checks import check_adapters_are_of_base, check_recipe
from uft_ds.run.prepare import check_run
from uft_ds.streams.base_weights import base_weights, stored_in_nf4
from uft_ds.streams.identity import base_identity, reference_identity
from uft_ds.streams.load import check_base_files
from uft_ds.streams.nf4 import check_can_be_nf4


@pytest.fixture
def nf4(tiny_qwen2: Path, tmp_path: Path) -> Path:
    return write_recipe(tmp_path, tiny_qwen2, model__quantization="nf4")


def test_the_recipe_of_it_is_accepted(nf4: Path) -> None:
    """Under the shipped ZeRO-3 file too."""
    settings, _ = check_run(settings_of_run(nf4))
    assert settings.model.quantization == "nf4"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("lora=null",), "model.quantization: nf4 given, but with lora: null all parameters are trained"),
        (("generator.by=vllm", "generator.url=http://x"), "generator.by: vllm serves the base in 16 bits"),
        (("model.quantization=fp4",), "model.quantization: 'fp4' given; input should be 'nf4'"),
        (("model.quantization=gptq",), "model.quantization: 'gptq' given"),
    ],
)
def test_what_cannot_be_with_it_is_refused(minimal: str, overrides: tuple[str, ...], message: str) -> None:
    """When the recipe is read."""
    assert message in refusal(minimal, "model.quantization=nf4", *overrides)


def test_a_base_on_a_disk_is_refused(nf4: Path, tmp_path: Path) -> None:
    """DeepSpeed's buffers for it are of the model's type."""
    zero = {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": str(tmp_path)}}
    (tmp_path / "disk.json").write_text(json.dumps({"zero_optimization": zero}))
    settings = with_deepspeed_file(settings_of_run(nf4, f"deepspeed={tmp_path / 'disk.json'}"))
    with pytest.raises(UserError, match=r"^model.quantization: nf4 given, but deepspeed: .*disk.json keeps the base"):
        check_recipe(settings)


def test_a_mixture_is_refused(tmp_path: Path) -> None:
    """Its experts would stay in 16 bits."""
    folder = build_mixture(tmp_path / "base", "olmoe")
    recipe = write_recipe(tmp_path, folder, model__quantization="nf4", lora__targets=list(TARGETS))
    with pytest.raises(UserError, match=r"only \d+% are in linear layers"):
        check_run(settings_of_run(recipe))


def test_a_weight_in_several_tensors_is_refused(tiny_qwen2: Path, tmp_path: Path) -> None:
    """A merged model could not be written; so the run is not launched. Nothing of the kind is read, either."""
    folder = shutil.copytree(tiny_qwen2, tmp_path / "base")
    model, empty = check_base_files(folder)
    name = "model.layers.0.mlp.up_proj.weight"
    lacking = {stored: tensor for stored, tensor in empty.items() if stored != name}
    with pytest.raises(UserError, match=rf"^model.quantization: nf4 given, but .* holds {name} as nothing"):
        stored_in_nf4(folder, model, lacking, check_can_be_nf4(model))
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors")
    settings = settings_of_run(write_recipe(tmp_path, folder, model__quantization="nf4"))
    with pytest.raises(UserError, match=rf"lacks {name}"):
        base_weights(folder, nf4_of(settings.model))


@pytest.mark.parametrize("key", ["start.adapter", "reference.adapter"])
def test_an_adapter_is_of_one_rounding(nf4: Path, tiny_qwen2: Path, tmp_path: Path, key: str) -> None:
    """One of the plain base is refused on NF4 and the reverse, with what to do; one that is marked is accepted."""
    adapter = saved_adapter(tiny_qwen2, tmp_path / "adapter")

    def check(**changes: Any) -> None:
        settings = changed(settings_of_run(nf4), {key: str(adapter)} | changes)
        check_adapters_are_of_base(settings, lambda done, total: None)

    plain = {"model.quantization": None}
    check(**plain)
    with pytest.raises(UserError, match=rf"^{key}: .* was trained on a base that is not quantised, as far as is known"):
        check()
    base = nf4_of(settings_of_run(nf4).model)
    assert base is not None
    write_mark(adapter, base)
    check()
    with pytest.raises(UserError, match=rf"^{key}: .* was trained on its base in NF4, and model.quantization is not"):
        check(**plain)


def test_the_reference_of_another_rounding_is_another(tmp_path: Path) -> None:
    """So its stored log-probs are not read; the identity of a plain base is what it was before there was NF4."""
    base = str(build_tiny_model(tmp_path / "base"))
    plain, rounded = base_identity(base, None), base_identity(base, None, quantization="nf4")
    assert set(plain) == {"weights", "config"}
    assert rounded == plain | {"quantization": "nf4"}
    of = {"dtype": "float32", "attention": "packed", "adapter_dtype": None}
    assert reference_identity(plain | {"adapter": None}, **of) != reference_identity(rounded | {"adapter": None}, **of)
