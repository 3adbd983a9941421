"""A task is known by what it asks and what grades it, not by where these lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from runs import write_recipe, write_rows

from uft_ds.errors import UserError
from uft_ds.recipe.to_settings import load_settings
from uft_ds.record.run_folder import RunFolder
from uft_ds.run.task_identity import Identities, other_contents, task_identities, write_task_identities

PROMPTS = [{"prompt": f"Ask {number}"} for number in range(3)]
CODE = "def score(messages, response, meta):\n    return 1.0\n"


def identities(folder: Path, *tasks: dict[str, Any]) -> Identities:
    return task_identities(load_settings(str(write_recipe(folder, folder / "base", evaluate={"tasks": list(tasks)}))))


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    (tmp_path / "run" / "data").mkdir(parents=True)
    return RunFolder(tmp_path / "run")


def test_other_prompts_under_a_name_are_another_task(tmp_path: Path, folder: RunFolder) -> None:
    """The same ones in another file are the same task."""
    task = {"name": "sums", "path": str(write_rows(tmp_path / "a.jsonl", PROMPTS)), "score_by": "regex:a"}
    write_task_identities(folder, identities(tmp_path, task))
    assert other_contents(folder, identities(tmp_path, task)) == []
    assert (
        other_contents(folder, identities(tmp_path, task | {"path": str(write_rows(tmp_path / "b.jsonl", PROMPTS))}))
        == []
    )
    changed = identities(tmp_path, task | {"path": str(write_rows(tmp_path / "a.jsonl", PROMPTS[:2]))})
    assert other_contents(folder, changed) == [
        "evaluate.tasks: 'sums' is another task than when the run began (rows); give it another name"
    ]
    assert other_contents(folder, identities(tmp_path, task | {"name": "others"})) == []


def test_another_scorer_is_another_task(tmp_path: Path, folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by what its module's file holds; where a judge is does not matter, what it is asked does."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "grading_of_mine.py").write_text(CODE)
    judge = {"by": "judge", "judge": {"url": "http://127.0.0.1:8000/v1", "model": "m"}}
    path = str(write_rows(tmp_path / "a.jsonl", PROMPTS))
    code = {"name": "code", "path": path, "score_by": {"by": "code:grading_of_mine:score"}}
    judged = {"name": "judged", "path": path, "score_by": judge}
    write_task_identities(folder, identities(tmp_path, code, judged))
    moved = judged | {"score_by": judge | {"judge": judge["judge"] | {"url": "http://127.0.0.1:9000/v1"}}}  # type: ignore[operator]
    assert other_contents(folder, identities(tmp_path, code, moved)) == []
    (tmp_path / "grading_of_mine.py").write_text(CODE.replace("1.0", "0.5"))
    other = judged | {"score_by": judge | {"judge": judge["judge"] | {"scale": [0, 5]}}}  # type: ignore[operator]
    found = other_contents(folder, identities(tmp_path, code, other))
    assert [line.partition(" is another")[0] for line in found] == [
        "evaluate.tasks: 'code'",
        "evaluate.tasks: 'judged'",
    ]


def test_a_task_that_was_left_out_is_remembered(tmp_path: Path, folder: RunFolder) -> None:
    """A run that went on without it, and takes it up again, has its older scores still."""
    path = str(write_rows(tmp_path / "a.jsonl", PROMPTS))
    first = {"name": "first", "path": path, "score_by": "regex:a"}
    write_task_identities(folder, identities(tmp_path, first))
    write_task_identities(folder, identities(tmp_path, first | {"name": "second"}))
    again = identities(tmp_path, first | {"path": str(write_rows(tmp_path / "b.jsonl", PROMPTS[:1]))})
    assert len(other_contents(folder, again)) == 1


def test_a_run_that_recorded_none_knows_none(tmp_path: Path, folder: RunFolder) -> None:
    """As one of an older version; a record that cannot be read is refused."""
    task = {"name": "sums", "path": str(write_rows(tmp_path / "a.jsonl", PROMPTS)), "score_by": "regex:a"}
    found = identities(tmp_path, task)
    assert other_contents(folder, found) == []
    write_task_identities(folder, {})
    assert list((folder.path / "data").iterdir()) == []
    (folder.path / "data" / "tasks.json").write_text("[]")
    with pytest.raises(UserError, match=r"tasks\.json: cannot be read"):
        other_contents(folder, found)
