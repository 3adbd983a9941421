"""A run is converted with the base, the tokenizer and the chat template that it was trained with, or not at all."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import whole_checkpoint
from runs import settings_of_run, write_recipe
from safetensors.torch import load_file, save_file
from tiny import CHATML, build_tiny_model

from uft_ds.errors import UserError
from uft_ds.export.convert import convert_to_adapter
from uft_ds.export.source import of_run
from uft_ds.host.locks import acquire
from uft_ds.record.run_folder import RunFolder
from uft_ds.run.prepare import prepare_run


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, a chat template, and a run of both that has one checkpoint."""
    folder = tmp_path_factory.mktemp("prepared")
    base = build_tiny_model(folder / "base", "qwen2", tied=False)
    (folder / "chat.jinja").write_text(CHATML)
    recipe = write_recipe(folder, base, data__workers=1)
    settings = settings_of_run(recipe, f"model.chat_template={folder / 'chat.jinja'}")
    prepare_run(settings, overwrite=False)[2].close()
    whole_checkpoint(folder / "run" / "checkpoints" / "step-000002")
    return folder


def change_weights(base: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    name = min(tensors)
    save_file({**tensors, name: tensors[name] + torch.ones_like(tensors[name])}, base / "model.safetensors")


def test_the_run_as_it_was_trained_is_converted(prepared: Path, tmp_path: Path) -> None:
    """Also by --base, with a copy of the base."""
    shutil.copytree(prepared / "base", tmp_path / "copy")
    for number, base in enumerate((None, str(tmp_path / "copy"))):
        out = convert_to_adapter(prepared / "run", tmp_path / f"out{number}", base=base).folder
        assert (out / "chat_template.jinja").read_text() == CHATML


def test_a_run_that_is_not_done_is_told(prepared: Path, tmp_path: Path) -> None:
    """With the step that is converted, and of how many; not a checkpoint that was chosen, nor a run that is done."""

    def said_of(path: Path) -> list[str]:
        said: list[str] = []
        of_run(path, say=said.append)
        return said

    run = prepared / "run"
    note = f"note: {run} is not done%s: its newest checkpoint is converted, step 2 of 4"
    assert said_of(run) == [note % ""]
    with acquire(RunFolder(run).lock):
        assert said_of(run) == [note % " and still going"]
    assert said_of(run / "checkpoints" / "step-000002") == []
    RunFolder(run).done.touch()
    try:
        assert said_of(run) == []
    finally:
        RunFolder(run).done.unlink()


def test_a_base_that_has_changed_is_refused(prepared: Path, tmp_path: Path) -> None:
    """Under its own path, and by --base; the copy of the former files is taken."""
    base, copy = prepared / "base", tmp_path / "copy"
    shutil.copytree(base, copy)
    try:
        change_weights(base)
        with pytest.raises(UserError, match=rf"^{base}: its content has changed since the run began.* give --base"):
            of_run(prepared / "run")
        with pytest.raises(UserError, match=rf"^--base: {base} is not the base that the run was trained on"):
            of_run(prepared / "run", str(base))
        assert of_run(prepared / "run", str(copy)).base == str(copy)
    finally:
        shutil.copyfile(copy / "model.safetensors", base / "model.safetensors")


def test_a_chat_template_that_has_changed_is_refused(prepared: Path, tmp_path: Path) -> None:
    """It would be shipped with the model; nothing is written."""
    template = prepared / "chat.jinja"
    template.write_text(f"Be kind. {CHATML}")
    try:
        with pytest.raises(UserError, match=rf"^model\.chat_template: {template}: .* not the one that the run"):
            convert_to_adapter(prepared / "run", tmp_path / "out")
    finally:
        template.write_text(CHATML)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", [None, "", "[]", "{}", '{"base": 1, "data": {}}', '{"base": {}, "data": {}}'])
def test_an_identity_that_cannot_be_read_is_named(prepared: Path, text: str | None) -> None:
    """Without it nothing says what the run was trained on."""
    identity = prepared / "run" / "identity.json"
    before = identity.read_text()
    identity.unlink()
    try:
        if text is not None:
            identity.write_text(text)
        with pytest.raises(UserError, match=rf"^{identity}: cannot be read"):
            of_run(prepared / "run")
    finally:
        identity.write_text(before)
