"""Models of images and text that are trained on text: their language model alone, converted into their own layout."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from runs import losses, recipe_in, settings_of_run, uft, write_recipe, write_rows
from safetensors import safe_open
from safetensors.torch import save_file
from suites import long_but
from toy import logps_by_name, saved_adapter, toy_model, toy_policy, toy_step
from transformers import AutoConfig, AutoModelForImageTextToText
from wrappers import OF_IMAGES, WRAPPERS, build_wrapper

from uft_ds.architectures.facts import attention_parity, is_passed_by_text, placeholder_ids
from uft_ds.data.micro_batch import micro_batch
from uft_ds.data.tokens.tokenize import PLACEHOLDER
from uft_ds.errors import UserError
from uft_ds.planning.structure import Lora, structure_of
from uft_ds.run.prepare import prepare_fitting_data
from uft_ds.streams.adapter_files import PREFIX
from uft_ds.streams.adapters import adapter_config_of, lora_form, start_policy_from_adapter


@pytest.fixture(scope="module", params=long_but(["gemma3"], WRAPPERS))
def wrapper(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wrapper(tmp_path_factory.mktemp("wrapper") / request.param, request.param)


def names_in(file: Path) -> list[str]:
    with safe_open(file, "pt") as opened:
        return sorted(opened.keys())


@pytest.mark.long
def test_packed_rows_in_lockstep_are_separate_forwards_of_each_sequence(wrapper: Path) -> None:
    """Bit for bit policy and reference of two forwards; and the model's own forward of each sequence alone."""
    batch = micro_batch(toy_step().sequences)
    found = {}
    for mode in ("lockstep", "separate"):
        options: dict[str, Any] = {"reference_mode": mode, "attention": "packed"}
        model = toy_model(wrapper, **options)
        found[mode] = logps_by_name(model, batch)
    assert all(torch.equal(found["lockstep"][name], found["separate"][name]) for name in ("policy", "reference"))
    assert (found["lockstep"]["policy"] - found["lockstep"]["reference"]).abs().mean() > 0.1
    own = model(batch, [model.streams["policy"]], through_logits=True)["policy"].token_logps_N
    packed = model(batch, [model.streams["policy"]])["policy"].token_logps_N
    assert (own - packed).abs().max() < 1e-4


@pytest.mark.long
def test_a_run_trains_the_language_model_alone(wrapper: Path, tmp_path: Path) -> None:
    """Adapters are on it alone; the written model has the wrapper's names, and what reads images is the base's."""
    recipe = recipe_in(tmp_path, wrapper)
    result = uft("train", str(recipe))
    assert result.returncode == 0, result.stdout + result.stderr
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]
    adapter = names_in(tmp_path / "run" / "latest" / "adapter" / "adapter_model.safetensors")
    assert all(".language_model.layers." in name for name in adapter)
    assert len(adapter) == 2 * 2 * 7
    result = uft("convert", str(tmp_path / "run"), str(tmp_path / "model"))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "100.00% of the adapter's log-ratios kept" in result.stdout
    assert names_in(tmp_path / "model" / "model.safetensors") == names_in(wrapper / "model.safetensors")
    assert (tmp_path / "model" / OF_IMAGES).read_bytes() == (wrapper / OF_IMAGES).read_bytes()
    ours = dict(AutoModelForImageTextToText.from_pretrained(tmp_path / "model").named_parameters())
    theirs = dict(AutoModelForImageTextToText.from_pretrained(wrapper).named_parameters())
    changed = {name for name, value in theirs.items() if not torch.equal(ours[name], value)}
    assert len(changed) == 14
    assert all(".language_model.layers." in name for name in changed)


def test_a_plan_counts_what_text_passes(wrapper: Path) -> None:
    """The language model and its head, not what reads images."""
    structure = structure_of(AutoConfig.from_pretrained(wrapper), Lora(4, 8.0, "all-linear", "float32"))
    model = AutoModelForImageTextToText.from_pretrained(wrapper)
    parts = (model.get_decoder(), model.get_output_embeddings())
    of_text = {id(p): p.numel() for part in parts for p in part.parameters()}
    assert structure.num_active == structure.num_read == sum(of_text.values())
    assert structure.num_base == sum(p.numel() for p in model.parameters()) > structure.num_active
    names = [name for name, p in model.named_parameters() if is_passed_by_text(model.config, name)]
    assert sum(dict(model.named_parameters())[name].numel() for name in names) == structure.num_active


def test_rows_are_divided_by_what_attention_costs(wrapper: Path) -> None:
    """By the numbers of the language model: the wrapper's own config has none, which would leave attention out."""
    config = AutoConfig.from_pretrained(wrapper)
    assert attention_parity(config) == attention_parity(config.text_config) < math.inf


def test_an_adapter_of_what_reads_images_is_no_start(wrapper: Path, tmp_path: Path) -> None:
    """PEFT's `all-linear` puts adapters there: such a one is merged first."""
    base = AutoModelForImageTextToText.from_pretrained(wrapper)
    get_peft_model(base, LoraConfig(r=4, lora_alpha=8.0, target_modules="all-linear")).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"start\.adapter: .*it adapts what reads images.*merge the adapter"):
        toy_model(wrapper, start_adapter=tmp_path)


def test_the_config_of_an_adapter_names_the_language_models_layers_alone(
    wrapper: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT loads it to the same bits by `target_modules` alone, and so it does where it shortens a long list of them;
    one that was written with `exclude_modules` is the same start."""
    older = saved_adapter(wrapper, tmp_path / "older")
    assert 'exclude_modules": "(?!' in (older / "adapter_config.json").read_text()
    policy: Any = toy_policy(wrapper)
    start_policy_from_adapter(policy, older)
    tensors = get_peft_model_state_dict(policy)
    written = json.loads(adapter_config_of(policy))
    assert written["exclude_modules"] is None
    assert written["target_modules"] == sorted({name.split(".lora_")[0].removeprefix(PREFIX) for name in tensors})
    assert all(name.startswith("model.language_model.layers.") for name in written["target_modules"])
    (tmp_path / "adapter").mkdir()
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(written))
    assert lora_form(tmp_path / "adapter") == lora_form(older)
    for longest in (len(written["target_modules"]) + 1, 1):
        monkeypatch.setattr("peft.tuners.tuners_utils.MIN_TARGET_MODULES_FOR_OPTIMIZATION", longest)
        loaded = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(wrapper), tmp_path / "adapter")
        found = get_peft_model_state_dict(loaded)
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    again: Any = toy_policy(wrapper, seed=3)
    start_policy_from_adapter(again, tmp_path / "adapter")
    assert all(torch.equal(found[name], tensor) for name, tensor in get_peft_model_state_dict(again).items())


@pytest.mark.parametrize("source_format", ["jsonl", "trl"])
def test_a_row_with_an_image_is_refused_by_its_place(wrapper: Path, tmp_path: Path, source_format: str) -> None:
    """Text is read, an image is not left out without a word."""
    asked = [{"type": "image", "image": "cat.png"}, {"type": "text", "text": "What is it?"}]
    row = {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": "A cat."}]}
    rows = write_rows(tmp_path / "rows.jsonl", [row])
    source = f"data.sources=[{{format: {source_format}, path: {rows}}}]"
    result = uft("train", str(recipe_in(tmp_path, wrapper)), source)
    assert result.returncode == 2
    assert f"{rows}:1: 'messages', turn 0: 'content', part 0: found 'image'" in result.stderr


def test_a_row_with_a_placeholder_of_the_base_is_left_out_and_counted(wrapper: Path, tmp_path: Path) -> None:
    """What the config calls the image's token is not trained on as text, whatever the tokenizer calls it. Here it is
    `<|endoftext|>`; `#`, which the config called so before, is an ordinary byte of this tokenizer."""
    assert 5 in placeholder_ids(AutoConfig.from_pretrained(wrapper))
    base = shutil.copytree(wrapper, tmp_path / "base")
    config = base / "config.json"
    changed, times = re.subn(r'("image_token_(id|index)"): 5', r"\1: 0", config.read_text(encoding="utf-8"))
    assert times == 1
    config.write_text(changed, encoding="utf-8")
    rows = [{"prompt": f"{text} What is it?", "response": "A cat."} for text in ("A cat.", "#", "<|endoftext|>")]
    source = {"format": "jsonl", "path": str(write_rows(tmp_path / "rows.jsonl", rows))}
    _, data = prepare_fitting_data(settings_of_run(write_recipe(tmp_path, base, data__sources=[source])))
    (prepared,) = data.train
    assert prepared.account.dropped == {PLACEHOLDER: 1}
    assert prepared.selection.store.places_of(PLACEHOLDER) == (f"{source['path']}:3",)
    assert prepared.num_responses == 2


def test_all_parameters_of_a_wrapper_are_refused(wrapper: Path, tmp_path: Path) -> None:
    """Text would leave those that read images as they are, with weight decay and without."""
    result = uft("train", str(recipe_in(tmp_path, wrapper)), "lora=null")
    assert result.returncode == 2
    assert "has parameters that no text reaches" in result.stderr
