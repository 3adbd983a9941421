"""What was trained on a base in NF4 is what is merged, loaded unmerged, and told of an adapter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from log_probs import hugging_face_logps
from peft import PeftModel
from reward_models import conversations, rewards_by, saved_reward_adapter
from safetensors.torch import load_file
from tiny import build_tiny_model
from toy import logps_by_name, saved_adapter, toy_model, toy_sequences
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from wrappers import build_wrapper

from uft_ds.data.micro_batch import micro_batch
from uft_ds.data.tokens.padding import save_for_scoring
from uft_ds.data.tokens.tokenize import load_tokenizer
from uft_ds.errors import CheckFailed, UserError
from uft_ds.export import convert
from uft_ds.export.agreement import compare
from uft_ds.export.convert import convert_to_adapter, convert_to_merged
from uft_ds.export.low_rank import read_low_rank
from uft_ds.export.model_card import FOR_REWARDS, model_card
from uft_ds.export.quantised import nf4_of_adapter, write_mark
from uft_ds.export.unmerged import opened_unmerged
from uft_ds.streams.load import auto_class
from uft_ds.streams.nf4 import MARK, Nf4Base, Nf4Linear, rounded
from uft_ds.streams.weight_files import WeightFiles

FLOAT32 = Nf4Base(torch.float32)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("nf4") / "base", "qwen2", tied=False)


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of some layers alone, on a base of which NF4 takes all; its folder says that it is on NF4."""
    folder = saved_adapter(base, tmp_path_factory.mktemp("adapter") / "saved", targets=["q_proj", "down_proj"])
    write_mark(folder, FLOAT32)
    return folder


@pytest.fixture(scope="module")
def merged(base: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("merged") / "model"
    found = convert_to_merged(adapter, out, base=str(base), say=lambda _: None).agreement
    assert found is not None
    assert found.relative_error < 1e-3
    return out


def test_a_merged_weight_is_the_rounded_one_and_the_delta(base: Path, adapter: Path, merged: Path) -> None:
    """Bit for bit; a linear layer without an adapter is rounded too, and nothing else is."""
    before, after = WeightFiles(base), load_file(merged / "model.safetensors")
    deltas = read_low_rank(adapter)
    kinds = set()
    for name in before.infos:
        stored = before.read(name)
        is_linear = ".layers." in name and stored.dim() == 2
        expected = rounded(stored, FLOAT32) if is_linear else stored
        if name in deltas:
            expected = deltas[name].delta().add_(expected)
        kinds.add((is_linear, name in deltas))
        assert torch.equal(after[name], expected), name
    assert kinds == {(False, False), (True, False), (True, True)}


def test_the_merged_model_is_the_trained_policy(base: Path, adapter: Path, merged: Path) -> None:
    """By Hugging Face's own forward of what was written, against the policy of a run on the base in NF4."""
    sequences = toy_sequences(4)
    model = toy_model(base, b_std=0.0, start_adapter=adapter, quantization="nf4", targets=["q_proj", "down_proj"])
    trained = logps_by_name(model, micro_batch(sequences))
    written = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    found = hugging_face_logps(written, sequences)
    torch.testing.assert_close(found.double(), trained["policy"].double(), rtol=0, atol=2e-3)
    assert (trained["policy"] - trained["reference"]).abs().max() > 0.3


def test_a_merge_into_the_unrounded_base_is_refused(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison before the folder gets its name fails, and nothing is left."""
    monkeypatch.setattr(convert, "base_weights", lambda folder, nf4: WeightFiles(folder))
    with pytest.raises(CheckFailed, match="the merged model: "):
        convert_to_merged(adapter, tmp_path / "wrong", base=str(base), say=lambda _: None)
    assert list(tmp_path.iterdir()) == []


def test_without_its_mark_an_adapter_is_of_the_plain_base(base: Path, adapter: Path, tmp_path: Path) -> None:
    """Why the mark is written: the two merged models differ by more than the comparison allows."""
    plain = shutil.copytree(adapter, tmp_path / "plain")
    (plain / MARK).unlink()
    out = convert_to_merged(plain, tmp_path / "model", base=str(base), say=lambda _: None).folder
    assert compare(base, adapter, out, toy_sequences(5)).is_faithful
    assert not compare(base, adapter, out, toy_sequences(5), nf4=FLOAT32).is_faithful


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerged_the_base_is_the_rounded_one(base: Path, adapter: Path, dtype: torch.dtype) -> None:
    """In 4 bits in the type that was trained in; the same values in another. Its identity is not the plain base's."""
    sequences = toy_sequences(4)
    with opened_unmerged(str(adapter), str(base)) as found:
        model, identity = found.load(dtype, CPU), found.identity()
    assert identity["base_quantization"] == "nf4, torch.float32"
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    stored = WeightFiles(base).read("model.layers.0.mlp.up_proj.weight")
    assert isinstance(layer, Nf4Linear) == (dtype == torch.float32)
    if dtype != torch.float32:
        assert torch.equal(layer.weight, rounded(stored, FLOAT32).to(dtype))
        return
    options = {"b_std": 0.0, "start_adapter": adapter, "quantization": "nf4", "targets": ["q_proj", "down_proj"]}
    trained = logps_by_name(toy_model(base, **options), micro_batch(sequences), "policy")["policy"]
    torch.testing.assert_close(hugging_face_logps(model, sequences).double(), trained.double(), rtol=0, atol=2e-3)


def test_the_cards_lines_load_what_was_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model of images and text too, whose class is another one: by transformers, PEFT and bitsandbytes."""
    config, wrapper = AutoConfig.from_pretrained(build_wrapper(tmp_path / "base", "qwen2_5_vl")), tmp_path / "base"
    adapter = saved_adapter(wrapper, tmp_path / "adapter")
    write_mark(adapter, FLOAT32)
    card = model_card(str(wrapper), None, None, title="it", nf4=FLOAT32, loaded_as=auto_class(config).__name__)
    found: dict[str, Any] = {}
    monkeypatch.chdir(adapter)
    exec(card.partition("```python\n")[2].partition("```")[0], found)  # the lines that a reader copies
    with opened_unmerged(str(adapter), str(wrapper)) as source:
        ours = source.load(torch.float32, CPU)
    ids = torch.arange(3, 40)[None]
    theirs = found["model"].train()  # in evaluation mode bitsandbytes packs the weights anew
    with torch.no_grad():
        torch.testing.assert_close(theirs(input_ids=ids).logits, ours(input_ids=ids).logits, rtol=0, atol=1e-4)


@torch.no_grad()
def test_a_reward_models_card_loads_its_classifier(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one label and the written padding token: the base pads with the token that ends an answer, and so would read
    each reward one token before it. Against the rounded weights, read by index."""
    adapter = saved_reward_adapter(base, tmp_path / "adapter")
    save_for_scoring(load_tokenizer(str(base)), adapter)
    card = model_card(str(base), None, None, title="it", nf4=FLOAT32, loaded_as=FOR_REWARDS)
    found: dict[str, Any] = {}
    monkeypatch.chdir(adapter)
    exec(card.partition("```python\n")[2].partition("```")[0], found)  # the lines that a reader copies
    given = conversations(groups=2)
    theirs = found["model"].train()  # in evaluation mode bitsandbytes packs the weights anew
    read = [theirs(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, 0] for prompt, answer in given]
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    for layer in (module for module in plain.model.layers.modules() if isinstance(module, torch.nn.Linear)):
        layer.weight.data = rounded(layer.weight.data, FLOAT32)
    expected = rewards_by(PeftModel.from_pretrained(plain, str(adapter)).eval(), given)
    torch.testing.assert_close(torch.stack(read), expected, rtol=0, atol=1e-4)
    assert expected.std() > 0.1


def test_the_mark_goes_along_and_is_checked(base: Path, adapter: Path, tmp_path: Path) -> None:
    """A copied adapter keeps it; one that says something else is refused by name."""
    copied = convert_to_adapter(adapter, tmp_path / "copy", base=str(base), say=lambda _: None).folder
    assert nf4_of_adapter(copied) == FLOAT32
    assert json.loads((copied / MARK).read_text()) == {"quantization": "nf4", "dtype": "float32"}
    (copied / MARK).write_text('{"quantization": "fp4"}')
    with pytest.raises(UserError, match=rf"{MARK}: cannot be read; expected .*nf4"):
        nf4_of_adapter(copied)
