"""config.json and generation_config.json that cannot be used are refused by the file, before any weights are read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import build_tiny_model
from toy import saved_adapter

from uft_ds.errors import UserError
from uft_ds.evaluation.generate import load_for_generation
from uft_ds.export.convert import convert_to_merged
from uft_ds.streams.load import check_base, check_base_files


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./gemma4", "{name}: no such folder; {here}$"),
        (
            "models/gemma4",
            "{name}: no such folder; {here}; did you mean models/gemma-4\\?; the hub gives no such model .*$",
        ),
        ("nobody/gemma4", "'{name}' is neither a local model folder nor available from the hub "),
    ],
)
def test_a_folder_that_is_not_there_is_told_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    """Shortly, and what is called alike; a name whose first part is no folder here is explained by the hub."""
    (tmp_path / "models" / "gemma-4").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    here = f"it is looked for in {tmp_path}, where the command was started"
    with pytest.raises(UserError, match=rf"^model\.base: {message.format(name=name, here=here)}") as refused:
        check_base(name, None)
    assert len(str(refused.value)) < 300 + len(str(tmp_path)) or name.startswith("nobody")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return build_tiny_model(tmp_path / "model", "llama")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("null", "null found, expected an object; fetch the model again"),
        ("5", "5 found, expected an object"),
        ("", "not valid JSON"),
        ("[" * 3000, "not valid JSON .*; fetch the file again"),
        ('{"model_type": "nosuch"}', "no config of a model that transformers knows .*nosuch"),
        ({"hidden_size": "x"}, "no config of a model that .*'hidden_size' expected int, got str"),
        ({"num_attention_heads": 7}, r"no config of a model that .*not a multiple of the number of attention heads"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: 0 found, expected a whole number from 1 on"),
    ],
    ids=str,
)
def test_a_broken_config_is_refused(folder: Path, text: str | dict[str, object], message: str) -> None:
    """transformers' reason is given whole, for it is rarely in the first line; a chat says the same of the file."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | text) if isinstance(text, dict) else text)
    with pytest.raises(UserError, match=rf"^model\.base: {path}: {message}"):
        check_base(str(folder), None)
    with pytest.raises(UserError, match=rf"^`{folder}` cannot be loaded as a model: {path}: {message}"):
        load_for_generation(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", r"\[1\] found, expected an object"),
        ("null", "null found, expected an object"),
        ('{"eos_token_id": "x"}', "eos_token_id: 'x' found, expected the number of a token, or null"),
        ('{"eos_token_id": [2, 0.5]}', r"eos_token_id: \[2, 0.5\] found, expected the number of a token"),
    ],
)
def test_a_broken_generation_config_is_refused(folder: Path, tmp_path: Path, text: str, message: str) -> None:
    """Before a run, whose merged model needs it, and by a conversion as the base's file, not as one of the output."""
    adapter = saved_adapter(folder, tmp_path / "adapter")
    path = folder / "generation_config.json"
    path.write_text(text)
    with pytest.raises(UserError, match=rf"^model\.base: {path}: {message}"):
        check_base_files(folder)
    with pytest.raises(UserError, match=rf"^`{folder}` cannot be loaded as a model: {path}: {message}"):
        load_for_generation(folder)
    with pytest.raises(UserError, match=rf"{path}: {message}"):
        convert_to_merged(adapter, tmp_path / "merged", base=str(folder), say=lambda _: None)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("text", ["{}", '{"eos_token_id": null}', '{"eos_token_id": 2}', '{"eos_token_id": [2, 0]}'])
def test_a_usable_generation_config_is_taken(folder: Path, text: str) -> None:
    """Each form in which models name their end tokens."""
    (folder / "generation_config.json").write_text(text)
    check_base_files(folder)
