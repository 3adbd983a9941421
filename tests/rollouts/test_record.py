"""The record of an online run: whole or absent, the same values again, and nothing is ever deleted."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from uft_ds.errors import UserError
from uft_ds.rollouts.record import Group, RecordFolder, ScoredAnswer, StepRecord

ANSWER = ScoredAnswer((4, 5), True, "t\u2028ext", 0.1, raw=1 / 3, reply="said", seed=7, logp=-1.25e-7)
GROUP = Group(0, 3, "a.jsonl:4", (1, 2, 3), ({"role": "user", "content": "hi\u2028x\x85"},), (ANSWER, ANSWER))
DROPPED = replace(GROUP, answers=(replace(ANSWER, score=None, reason="timed out"),), left_out="no score")
RECORD = StepRecord(2, "f" * 64, {"by": "test"}, {"0": {"scorer": "x"}}, (GROUP, DROPPED), {"generation": 0.1})


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    """To the last bit of each number, and with every character."""
    record = RecordFolder(tmp_path)
    record.write(RECORD)
    assert record.read(2) == RECORD
    assert record.read(1) is None
    assert record.numbers() == [2]
    assert files(tmp_path) == ["answers/000002.jsonl", "steps/000002.json"]


def test_answers_without_the_steps_own_file_do_not_count(tmp_path: Path) -> None:
    """A kill between the two leaves a step that was not recorded, and is generated anew over the remains."""
    record = RecordFolder(tmp_path)
    record.write(RECORD)
    record.step_file(2).unlink()
    assert record.read(2) is None
    record.write(RECORD)
    assert record.read(2) == RECORD


def test_a_record_of_another_policy_is_put_aside(tmp_path: Path) -> None:
    """Under the hash of its policy, where no reader of the answers as data finds it; also several times."""
    record = RecordFolder(tmp_path)
    record.write(RECORD)
    record.write(replace(RECORD, policy="a" * 64))
    record.write(RECORD)
    record.write(RECORD)
    assert record.read(2) == RECORD
    assert record.numbers() == [2]
    assert [name for name in files(tmp_path) if name.endswith(".jsonl")] == ["answers/000002.jsonl"]
    assert len([name for name in files(tmp_path) if name.endswith(".aside")]) == 3


def test_a_refused_step_says_why(tmp_path: Path) -> None:
    """It is not trained on again, and its answers are kept."""
    record = RecordFolder(tmp_path)
    record.write(RECORD)
    record.refuse(2, "another policy has answered")
    assert record.read(2) is None
    assert (tmp_path / "steps" / "000002.ffffffff.txt").read_text() == "another policy has answered\n"
    assert (tmp_path / "answers" / "000002.ffffffff.jsonl.aside").exists()


def test_changed_answers_are_refused(tmp_path: Path) -> None:
    """A score that somebody has corrected by hand would be trained on by one start and not by another."""
    record = RecordFolder(tmp_path)
    record.write(RECORD)
    path = record.answers_file(2)
    path.write_text(path.read_text(encoding="utf-8").replace("0.1", "0.2"), encoding="utf-8")
    with pytest.raises(UserError, match=r"000002\.jsonl: its content is not what 000002.json was written for"):
        record.read(2)
    path.unlink()
    with pytest.raises(UserError, match=r"000002\.jsonl: cannot be read"):
        record.read(2)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"policy": 3}', "\x00"])
def test_a_damaged_step_file_is_named(tmp_path: Path, content: str) -> None:
    """By its path, with what to do."""
    record = RecordFolder(tmp_path)
    record.write(RECORD)
    record.step_file(2).write_text(content)
    with pytest.raises(UserError, match=r"000002\.json: .*bring both files"):
        record.read(2)


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    """This version would misread it."""
    record = RecordFolder(tmp_path)
    record.write(RECORD)
    content = json.loads(record.step_file(2).read_text())
    record.step_file(2).write_text(json.dumps(content | {"format": 2}))
    with pytest.raises(UserError, match="written by a newer uft_ds"):
        record.read(2)


def test_half_of_a_surrogate_pair_is_kept(tmp_path: Path) -> None:
    """A judge's reply may hold one, and UTF-8 has no form for it."""
    record = RecordFolder(tmp_path)
    odd = replace(RECORD, groups=(replace(GROUP, answers=(replace(ANSWER, reply="7 \ud83d"),)),))
    record.write(odd)
    assert record.read(2) == odd


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"score": 7.5}, "a score of 7.5"),
        ({"score": None}, "an answer without a score"),
        ({"ids": []}, "expected token ids"),
        ({"ids": [3, -1]}, "expected token ids"),
        ({"ids": [True]}, "expected token ids"),
    ],
)
def test_values_that_nothing_has_written_are_refused(tmp_path: Path, change: dict[str, Any], problem: str) -> None:
    """By file and line, though the hash agrees: a record may be made by another program."""
    record = RecordFolder(tmp_path)
    record.write(RECORD)
    path = record.answers_file(2)
    first, *rest = path.read_text().split("\n")
    group = json.loads(first)
    group["answers"][0] |= change
    path.write_text("\n".join([json.dumps(group), *rest]))
    step = json.loads(record.step_file(2).read_text())
    record.step_file(2).write_text(json.dumps(step | {"answers_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}))
    with pytest.raises(UserError) as refused:
        record.read(2)
    assert f"{path}:1" in str(refused.value)
    assert problem in str(refused.value)


def test_the_scorers_of_the_newest_step_before_are_found(tmp_path: Path) -> None:
    """Also where steps in between have asked no prompt, and so have no record."""
    record = RecordFolder(tmp_path)
    assert record.scorers_before(5) == {}
    record.write(RECORD)
    record.write(replace(RECORD, number=5, scorers={"0": {"scorer": "y"}}))
    assert record.scorers_before(5) == {"0": {"scorer": "x"}}
    assert record.scorers_before(9) == {"0": {"scorer": "y"}}
    assert record.scorers_before(2) == {}
