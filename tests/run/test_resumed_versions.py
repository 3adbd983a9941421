"""What a resume says and keeps of the versions that a run was made with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from uft_ds.record.run_folder import RunFolder
from uft_ds.run.resume import _other_versions, _record_resume


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


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"packages": 1, "resumes": 3}'])
def test_an_environment_that_cannot_be_read_is_no_end(folder: RunFolder, text: str) -> None:
    """The run goes on, with a warning, and what it goes on with is recorded."""
    folder.environment.write_text(text)
    assert "cannot be read" in next(_other_versions(folder, environment("2.10"), 5))
    _record_resume(folder, environment("2.10"), 5)
    assert json.loads(folder.environment.read_text())["resumes"][-1]["step"] == 5
