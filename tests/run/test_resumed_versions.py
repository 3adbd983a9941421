"""What a resume says and keeps of the versions that a run was made with."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import settings_of_run, write_recipe
from tiny import build_tiny_model

from uft_ds.data.store.building import RowRules
from uft_ds.errors import UserError
from uft_ds.record.run_folder import RunFolder
from uft_ds.run.identity import environment as run_environment
from uft_ds.run.resume import _check_same_content, _other_versions, _record_resume


def environment(torch: str) -> dict[str, Any]:
    return {"packages": {"torch": torch, "peft": "0.21.0"}, "python": "3.11", "git_revision": None}


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path)
    folder.environment.write_text(json.dumps({**environment("2.10"), "reference_adapter": "a"}))
    return folder


def test_each_resume_is_recorded_beside_the_start(folder: RunFolder) -> None:
    """The start's own lines stay as they were; each resume adds its step and its versions."""
    _record_resume(folder, environment("2.11"), 200)
    _record_resume(folder, environment("2.12"), 400)
    stored = json.loads(folder.environment.read_text())
    assert (stored["packages"]["torch"], stored["reference_adapter"]) == ("2.10", "a")
    assert [(r["step"], r["packages"]["torch"]) for r in stored["resumes"]] == [(200, "2.11"), (400, "2.12")]


def test_steps_made_with_other_versions_are_told(folder: RunFolder) -> None:
    """Also where only a resume between had other ones; not those of a resume whose steps are taken back."""
    assert list(_other_versions(folder, environment("2.10"), 200)) == []
    _record_resume(folder, environment("2.11"), 200)
    (warning,) = _other_versions(folder, environment("2.10"), 400)
    assert "was resumed at step 200 with other versions" in warning
    assert "torch 2.10 now, 2.11 then" in warning
    assert list(_other_versions(folder, environment("2.10"), 200)) == []
    (warning,) = _other_versions(folder, environment("2.11"), 400)
    assert warning.startswith("the run began with other versions")


def test_another_attention_is_told(folder: RunFolder) -> None:
    """`auto` on another machine; a start that did not record it is not compared."""
    now = {**environment("2.10"), "attention": "sdpa"}
    now["packages"]["flash-attn"] = "not installed"
    assert list(_other_versions(folder, now, 200)) == []
    then = {**now, "packages": {**now["packages"], "flash-attn": "2.8.3"}, "attention": "flash_attention_2"}
    folder.environment.write_text(json.dumps(then))
    (warning,) = _other_versions(folder, now, 200)
    assert "flash-attn not installed now, 2.8.3 then" in warning
    assert "attention sdpa now, flash_attention_2 then" in warning


def test_the_attention_of_auto_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the name of the implementation, with the version of its package; packed where the tests cover the family."""
    base = build_tiny_model(tmp_path / "base", "qwen2")
    settings = settings_of_run(write_recipe(tmp_path, base, model__dtype="bfloat16"))
    assert run_environment(settings)["attention"] == "packed"
    monkeypatch.setattr("uft_ds.streams.load.is_shown_to_pack", lambda config: False)
    monkeypatch.setattr("uft_ds.streams.load.importlib.util.find_spec", lambda name: name)
    for has_gpu, expected in ((False, "sdpa"), (True, "flash_attention_2")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda has_gpu=has_gpu: has_gpu)
        found = run_environment(settings)
        assert found["attention"] == expected
        assert "flash-attn" in found["packages"]


def test_rules_that_came_later_have_their_defaults(folder: RunFolder) -> None:
    """A run of a version without `mixed_kinds` is resumed; where the rule is given now, it is another run."""
    rules = RowRules("jsonl", None, 64, merge=True, trim_prompt=False)
    stored = json.loads(json.dumps({"rules": asdict(rules), "content": "c"}))
    older = {"rules": {key: stored["rules"][key] for key in ("format", "score", "max_length", "merge", "trim_prompt")}}
    folder.identity.write_text(json.dumps({"base": {}, "adapter": None, "data": {"sources.0": {**stored, **older}}}))
    _check_same_content(folder, {"base": {}, "adapter": None, "data": {"sources.0": stored}})
    stored["rules"]["mixed_kinds"] = True
    with pytest.raises(UserError, match=r"data\.sources\.0\.rules\.mixed_kinds: true now, false then"):
        _check_same_content(folder, {"base": {}, "adapter": None, "data": {"sources.0": stored}})


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"packages": 1, "resumes": 3}'])
def test_an_environment_that_cannot_be_read_is_no_end(folder: RunFolder, text: str) -> None:
    """The run goes on, with a warning, and what it goes on with is recorded."""
    folder.environment.write_text(text)
    assert "cannot be read" in next(_other_versions(folder, environment("2.10"), 5))
    _record_resume(folder, environment("2.10"), 5)
    assert json.loads(folder.environment.read_text())["resumes"][-1]["step"] == 5
