"""What is said of a folder that is not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from uft_ds.host.missing import begins_in_a_folder, has_the_form_of_a_path, no_such_folder


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("./models", "path"),
        ("/nowhere", "path"),
        ("~/models", "path"),
        ("a/b/c", "path"),
        ("models/gemma4", "either"),
        ("Qwen/Qwen2.5-7B", "hub"),
        ("models", "hub"),
    ],
)
def test_the_form_of_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, form: str) -> None:
    """Two parts may be of the hub; where the first one is a folder here, they may be a path as well."""
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    assert form == ("path" if has_the_form_of_a_path(name) else "either" if begins_in_a_folder(name) else "hub")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("models/gemma4", "models/gemma-4 or models/Gemma-4-it"),
        ("model/gemma4", "models"),
        ("models/gemma-4/weights/shards", ""),
        ("nothing/alike/there", ""),
    ],
)
def test_near_names_beside_it_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, near: str) -> None:
    """Beside the first part that is not there, with letters of any case; an absolute path needs no place."""
    for there in ("Gemma-4-it", "gemma-4", "qwen"):
        (tmp_path / "models" / there).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    hint = near and f"; did you mean {near}?"
    here = f"no such folder; it is looked for in {tmp_path}, where the command was started"
    assert no_such_folder(name) == here + hint
    absolute = near and f"; did you mean {near.replace('models', f'{tmp_path}/models')}?"
    assert no_such_folder(str(tmp_path / name)) == f"no such folder{absolute}"
