"""`uft train --dry-run`: what a run would do, with all its checks, and nothing written into its folder."""

from __future__ import annotations

import io
import socket
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from runs import write_recipe
from typer.testing import CliRunner

from uft_ds.cli import app
from uft_ds.errors import UserError
from uft_ds.recipe.to_settings import load_settings
from uft_ds.run.prepare import prepare_run
from uft_ds.run.settings import located
from uft_ds.run.start import Rehearsal, rehearse


def rehearsed(recipe: Path, *overrides: str, **how: Any) -> tuple[Rehearsal | None, str]:
    text = io.StringIO()
    found = rehearse(load_settings(str(recipe), overrides), Console(file=text, width=500), **how)
    return found, text.getvalue()


def everything_in(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Content and time of each file, by its name."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def test_what_would_be_trained_is_said_and_nothing_written(tiny_qwen2: Path, tmp_path: Path) -> None:
    """Steps, responses, epochs, rows left out, memory; neither a folder of a run nor the reference's cache appears."""
    recipe = write_recipe(tmp_path, tiny_qwen2, train__steps=7, data__max_length=40)
    before = set(tmp_path.iterdir())
    result = CliRunner().invoke(app, ["train", str(recipe), "--dry-run"])
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    assert "7 steps of at least 8 responses" in said
    assert "longer than max_length" in said
    assert "responses in all, " in said
    assert "memory: at most about " in said
    assert "2 ranks would start, every check has passed" in said
    assert set(tmp_path.iterdir()) - before == {tmp_path / "tokenized"}, "only tokens are kept"


def test_amounts_by_hand(tiny_qwen2: Path, tmp_path: Path) -> None:
    """32 responses an epoch in steps of 8: six steps hold one epoch and a half."""
    found, said = rehearsed(write_recipe(tmp_path, tiny_qwen2, train__steps=6))
    assert found is not None
    assert (found.num_steps, found.done) == (6, 0)
    assert "48 responses in all, 1.5 epochs of 32\n" in said


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("deepspeed=zero4", "deepspeed: "),
        ("model.base=nowhere", "model.base"),
        ("data.sources.0.path=nowhere.jsonl", "nowhere.jsonl: no such file"),
        ("reference.adapter=nowhere", "reference.adapter: nowhere: no such folder"),
        ("lora.targets=[qproj]", "lora.targets: no layer is called 'qproj'"),
        ("objective.loss=dpo", "objective.loss: 'dpo' needs pairs"),
    ],
)
def test_what_train_refuses_is_refused(tiny_qwen2: Path, tmp_path: Path, override: str, message: str) -> None:
    """With the same message and exit code 2, and nothing in the output."""
    recipe = write_recipe(tmp_path, tiny_qwen2)
    with pytest.raises(UserError) as dry:
        rehearsed(recipe, override)
    with pytest.raises(UserError) as real:
        prepare_run(located(load_settings(str(recipe), (override,))), overwrite=False)
    assert message in str(dry.value)
    assert str(dry.value) == str(real.value)
    assert dry.value.exit_code == 2
    assert not (tmp_path / "run").exists()


def test_a_port_in_use_is_refused(tiny_qwen2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As before a launch."""
    recipe = write_recipe(tmp_path, tiny_qwen2)
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        with pytest.raises(UserError, match="is in use; unset MASTER_PORT"):
            rehearsed(recipe)


def test_a_folder_that_a_run_holds(tiny_qwen2: Path, tmp_path: Path) -> None:
    """Refused as by train: a run that is there, unless it may be overwritten; one that is running; other files."""
    recipe = write_recipe(tmp_path, tiny_qwen2)
    folder, _, lock = prepare_run(located(load_settings(str(recipe))), overwrite=False)
    with pytest.raises(UserError, match="is in use by a run that is still running"):
        rehearsed(recipe, overwrite=True)
    lock.close()
    assert rehearsed(recipe)[0] is not None, "it never trained, so nothing would be lost"
    folder.metrics.write_text('{"step": 1}\n')
    before = everything_in(folder.path)
    with pytest.raises(UserError, match="already holds a run that did not finish"):
        rehearsed(recipe)
    assert rehearsed(recipe, overwrite=True)[0] is not None
    _, said = rehearsed(recipe, resume=True)
    assert "would resume at step 0: there is no checkpoint" in said
    assert everything_in(folder.path) == before
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="holds files that are not from a run of uft"):
        rehearsed(recipe, f"output={tmp_path / 'notes'}")
    with pytest.raises(UserError, match="is a file, expected a folder"):
        rehearsed(recipe, f"output={tmp_path / 'notes' / 'mine.txt' / 'run'}")
    assert [path.name for path in (tmp_path / "notes").iterdir()] == ["mine.txt"]
