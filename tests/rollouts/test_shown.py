"""What the report shows of an online run's answers."""

from __future__ import annotations

from pathlib import Path

from uft_ds.rollouts.record import Group, RecordFolder, ScoredAnswer, StepRecord
from uft_ds.rollouts.shown import shown


def recorded(folder: Path, steps: int) -> RecordFolder:
    """Three prompts a step, of which the second is left out."""
    record = RecordFolder(folder)
    for number in range(1, steps + 1):
        groups = []
        for unit in range(3):
            answers = (ScoredAnswer((5, 2), True, f"good {unit}", 1.0), ScoredAnswer((6, 2), True, "bad", 0.0))
            left_out = "late" if unit == 1 else ""
            messages = ({"role": "system", "content": "brief"}, {"role": "user", "content": f"ask {unit}"})
            groups.append(Group(0, unit, f"p.jsonl:{unit + 1}", (1,), messages, answers, left_out))
        record.write(StepRecord(number, "a" * 64, {}, {}, tuple(groups)))
    return record


def test_some_steps_are_shown_with_both_ends(tmp_path: Path) -> None:
    """Of each the prompts that were trained on, with the texts and scores of their answers."""
    found = shown(recorded(tmp_path, 30))
    steps = sorted({prompt.step for prompt in found})
    assert len(steps) == 8
    assert (steps[0], steps[-1]) == (1, 30)
    assert [prompt.prompt for prompt in found[:2]] == ["ask 0", "ask 2"]
    assert found[0].answers == (("good 0", 1.0), ("bad", 0.0))


def test_few_steps_are_all_shown(tmp_path: Path) -> None:
    assert [prompt.step for prompt in shown(recorded(tmp_path, 2))] == [1, 1, 2, 2]
    assert shown(RecordFolder(tmp_path / "nothing")) == []
