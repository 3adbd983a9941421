"""The folder of one evaluation: continued with the same settings, never mixed with others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from uft_ds.errors import UserError
from uft_ds.evaluation.harness.folder import ANSWERS, BEGUN, Begun, begin, has_ended
from uft_ds.evaluation.results import Evaluation, TaskResult, write_evaluation

BEGINNING = Begun({"base": "m", "base_weights": ["ab"]}, {"limit": 3, "tasks": {"t": {"shots": 5}}})


def test_it_is_continued_until_it_has_ended(tmp_path: Path) -> None:
    """Then its results are what it returns."""
    folder = tmp_path / "a" / "b"
    assert begin(folder, BEGINNING, overwrite=False) is None
    assert begin(folder, BEGINNING, overwrite=False) is None
    found = Evaluation("m", BEGINNING.model, BEGINNING.settings, [TaskResult("t", {"acc,none": 0.5}, 3, "1", 5)])
    write_evaluation(folder, found, {})
    assert begin(folder, BEGINNING, overwrite=False) == found


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    """And the evaluation that is there stays as it is."""
    begin(tmp_path / "out", BEGINNING, overwrite=False)
    other = Begun(BEGINNING.model, {"limit": 3, "tasks": {"t": {"shots": 0}}})
    with pytest.raises(UserError, match=r"another settings\.tasks\.t\.shots: 5 there, 0 now; .*--overwrite"):
        begin(tmp_path / "out", other, overwrite=False)
    assert json.loads((tmp_path / "out" / BEGUN).read_text())["settings"]["tasks"]["t"]["shots"] == 5


def test_overwriting_leaves_nothing_of_the_other_one(tmp_path: Path) -> None:
    """Neither answers nor results; what another rank has begun to answer of this one stays."""
    folder = tmp_path / "out"
    begin(folder, BEGINNING, overwrite=False)
    other = Begun({"base": "n"}, {})
    for path in (BEGINNING.answers(folder), other.answers(folder)):
        path.mkdir(parents=True)
    write_evaluation(folder, Evaluation("m", {}, {}, [TaskResult("t", {"acc,none": 0.5}, 3, "1")]), {})
    assert begin(folder, other, overwrite=True) is None
    assert {path.name for path in folder.iterdir()} == {BEGUN, ANSWERS}
    assert list((folder / ANSWERS).iterdir()) == [other.answers(folder)]


def test_what_is_no_evaluation_is_never_deleted(tmp_path: Path) -> None:
    """With --overwrite neither."""
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty, and no evaluation"):
        begin(tmp_path, BEGINNING, overwrite=True)
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_another_rank_may_begin_first(tmp_path: Path) -> None:
    """Its folder of answers is no foreign content."""
    BEGINNING.answers(tmp_path).mkdir(parents=True)
    assert begin(tmp_path, BEGINNING, overwrite=False) is None
    assert not has_ended(tmp_path, BEGINNING)
    write_evaluation(tmp_path, Evaluation("m", {}, {}, [TaskResult("t", {"acc,none": 0.5}, 3, "1")]), {})
    assert has_ended(tmp_path, BEGINNING)
    assert not has_ended(tmp_path, Begun({}, {}))
