"""A base whose weight files are not whole is refused before any data is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from runs import settings_of_run, write_recipe
from safetensors.torch import load_file, save_file
from tiny import build_tiny_model
from toy import saved_adapter
from transformers import AutoTokenizer
from typer.testing import CliRunner

from uft_ds.commands.data import app as data_commands
from uft_ds.errors import UserError
from uft_ds.evaluation.generate import check_model_folder
from uft_ds.export.convert import convert_to_merged
from uft_ds.planning.shapes import model_config
from uft_ds.run.prepare import check_run
from uft_ds.streams.load import check_base

NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("is_hub", [False, True])
def test_weights_come_before_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_hub: bool) -> None:
    """Of a folder and of a hub model alike, which was downloaded by then: tokenising may take an hour."""
    hub = tmp_path / "hub" / "models--some--model"
    folder = hub / "snapshots" / ("a" * 40)
    build_tiny_model(folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors[NAME]
    save_file(tensors, folder / "model.safetensors")
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("a" * 40)
    for name in ("huggingface_hub.constants.HF_HUB_CACHE", "transformers.utils.hub.constants.HF_HUB_CACHE"):
        monkeypatch.setattr(name, str(tmp_path / "hub"))
    recipe = write_recipe(tmp_path, Path("some/model") if is_hub else folder)
    with pytest.raises(UserError, match=rf"^model\.base: {folder}/model\.safetensors: lacks {NAME}"):
        check_run(settings_of_run(recipe))
    assert not (tmp_path / "tokenized").exists()


def test_a_tokenizer_beyond_the_embedding_comes_before_the_data(tmp_path: Path) -> None:
    """Its tokens are named, by train, by the preview and by convert alike."""
    folder = build_tiny_model(tmp_path / "model")
    adapter = saved_adapter(folder, tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<think>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match=r"^model\.base: .*'<think>' \(259\)"):
        check_run(settings_of_run(write_recipe(tmp_path, folder)))
    with pytest.raises(UserError, match=r"^model\.base: .*'<think>' \(259\)"):
        CliRunner().invoke(data_commands, ["preview", str(tmp_path / "recipe.yaml")], catch_exceptions=False)
    assert not (tmp_path / "tokenized").exists()
    with pytest.raises(UserError, match=r"'<think>' \(259\)"):
        convert_to_merged(adapter, tmp_path / "merged", base=str(folder), say=lambda _: None)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8"])
def test_a_quantised_base_is_refused_before_anything_else(tmp_path: Path, method: str) -> None:
    """By train, plan and convert, with the one remedy that helps, and no package to install."""
    folder = build_tiny_model(tmp_path / "model")
    adapter = saved_adapter(folder, tmp_path / "adapter")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": method}}))
    message = rf"{folder}: its weights are quantised \({method}\),.*take the 16-bit model"
    with pytest.raises(UserError, match=message):
        check_run(settings_of_run(write_recipe(tmp_path, folder)))
    with pytest.raises(UserError, match=message):
        model_config(str(folder))
    with pytest.raises(UserError, match=message):
        convert_to_merged(adapter, tmp_path / "merged", base=str(folder), say=lambda _: None)


def test_what_is_no_model_folder_is_named(tmp_path: Path) -> None:
    """A GGUF file, a folder of such files, another file, an empty folder: what it is, and what to give instead."""
    gguf = tmp_path / "files" / "model.Q4_K_M.gguf"
    gguf.parent.mkdir()
    gguf.write_bytes(b"GGUF\3\0\0\0")
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 20)
    (tmp_path / "empty").mkdir()
    for base, found in (
        (gguf, "is a GGUF file, whose weights are rounded for inference: take the 16-bit model"),
        (gguf.parent, "holds GGUF files, whose weights are rounded for inference: take the 16-bit model"),
        (tmp_path / "model.safetensors", "is a file; expected a model folder in Hugging Face's layout"),
        (tmp_path / "empty", "holds no config.json; expected a model folder"),
    ):
        with pytest.raises(UserError) as refused:
            check_base(str(base), None)
        assert str(refused.value).startswith(f"model.base: {base} {found}")
    with pytest.raises(UserError, match="is a GGUF file"):
        check_model_folder(gguf)  # as `uft chat` does
