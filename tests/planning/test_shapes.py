"""Known shapes: from the package, a local folder, or the hub's cache."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from suites import long_but
from transformers import AutoModelForCausalLM

from uft_ds.errors import UserError
from uft_ds.planning.shapes import SHIPPED, model_config, shipped_config
from uft_ds.planning.structure import Lora, structure_of

# Numbers of parameters as the makers' pages and weight files have them.
PUBLISHED = {
    "Qwen1.5-32B": 32_512_218_112,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-32B": 32_763_876_352,
    "Qwen2.5-72B": 72_706_203_648,
    "Qwen3-32B": 32_762_123_264,
    "Mistral-7B-v0.1": 7_241_732_096,
    "Mistral-7B-v0.3": 7_248_023_552,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.1-70B": 70_553_706_496,
}

LORA = Lora(16, 16.0, "all-linear", "float32")


@pytest.mark.parametrize(
    "name", long_but(("Qwen2.5-32B", "Mistral-7B-v0.1", "Llama-3.1-8B"), sorted(set(SHIPPED.values())))
)
def test_the_count_is_published_and_that_of_an_empty_model(name: str) -> None:
    """A plan counts exactly what transformers builds without weights, and what the makers say."""
    config = shipped_config(name)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    counted = structure_of(shipped_config(name), LORA)
    assert counted.num_base == sum(p.numel() for p in model.parameters()) == PUBLISHED[name]
    assert counted.num_layers == config.num_hidden_layers


def test_a_local_folder_is_read_and_needs_no_weights(tmp_path: Path) -> None:
    """The folder's config.json decides, whatever names are known."""
    config = shipped_config("Qwen2.5-7B")
    config.num_hidden_layers, config.layer_types = 3, ["full_attention"] * 3
    config.save_pretrained(tmp_path)
    found, source = model_config(str(tmp_path))
    assert found.num_hidden_layers == 3
    assert source == str(tmp_path / "config.json")


def test_the_hub_cache_is_read_before_the_shipped_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A config that was fetched is the model's own; a shipped one stands in for it."""
    snapshot = tmp_path / "models--Qwen--Qwen2.5-7B" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    refs = tmp_path / "models--Qwen--Qwen2.5-7B" / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    values = shipped_config("Qwen2.5-7B").to_dict() | {"vocab_size": 1000}
    (snapshot / "config.json").write_text(json.dumps(values))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert model_config("Qwen/Qwen2.5-7B")[0].vocab_size == 1000
    assert "shipped config of Qwen2.5-32B" in model_config("Qwen/Qwen2.5-32B")[1]


def test_an_unknown_model_is_refused_with_what_is_known() -> None:
    """Nothing is downloaded: the message says what would do instead."""
    with pytest.raises(UserError, match=r"'no/such-model' is not a local folder.*config\.json.*Qwen/Qwen2\.5-32B"):
        model_config("no/such-model")


@pytest.mark.parametrize("name", ["models/gemma4", "./gemma4", "models/gemma4/first"])
def test_a_folder_that_is_not_there_needs_no_word_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Where it was looked for, and no list of what is shipped."""
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match=rf"^model\.base: {name}: no such folder; it is looked for in {tmp_path}, [^;]*$"
    ):
        model_config(name)


def test_every_known_name_has_a_file_that_is_asked_for() -> None:
    """No shipped file is forgotten, and none is missing."""
    folder = Path(shipped_config.__code__.co_filename).parent / "configs"
    assert {path.stem for path in folder.glob("*.json")} == set(SHIPPED.values()) == set(PUBLISHED)
    assert torch.get_default_device().type == "cpu"  # no device was left switched
