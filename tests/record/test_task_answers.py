"""tasks.jsonl: answers in the order of steps, cut at a resume; damaged lines are left out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from uft_ds.record.lines_of_steps import cut_after, read_lines, write_step
from uft_ds.record.task_answers import TaskAnswer

ANSWER = TaskAnswer(0, "sums", "sums.jsonl:1", "2 + 2?", "4", 1.0, "", ended=True)
UNSCORED = replace(ANSWER, origin="sums.jsonl:2", score=None, reason="the judge gave no verdict")


def test_answers_stand_in_the_order_of_steps(tmp_path: Path) -> None:
    """What a resumed run makes again replaces the step and what came after it."""
    path = tmp_path / "tasks.jsonl"
    assert read_lines(path, TaskAnswer) == []
    for step in (0, 2, 4):
        write_step(path, step, [replace(ANSWER, step=step), replace(UNSCORED, step=step)], TaskAnswer)
    write_step(path, 2, [replace(ANSWER, step=2, answer="5")], TaskAnswer)
    assert read_lines(path, TaskAnswer) == [ANSWER, UNSCORED, replace(ANSWER, step=2, answer="5")]
    cut_after(path, 0, TaskAnswer)
    assert read_lines(path, TaskAnswer) == [ANSWER, UNSCORED]
    cut_after(tmp_path / "none.jsonl", 0, TaskAnswer)
    assert not (tmp_path / "none.jsonl").exists()


@pytest.mark.parametrize("change", [{"step": "0"}, {"score": "1"}, {"ended": 1}, {"answer": None}, {"score": True}])
def test_damaged_lines_are_left_out(tmp_path: Path, change: dict[str, object]) -> None:
    """Types that the report would stumble over, and half a line."""
    path = tmp_path / "tasks.jsonl"
    write_step(path, 0, [replace(ANSWER, **change), UNSCORED], TaskAnswer)  # type: ignore[arg-type]
    with path.open("a") as file:
        file.write('{"step": 1, "task":')
    assert read_lines(path, TaskAnswer) == [UNSCORED]
