"""The file of answers that a run leaves."""

from __future__ import annotations

from pathlib import Path

from uft_ds.record.lines_of_steps import cut_after, read_lines, write_step
from uft_ds.record.samples import Sample


def sample(step: int, answer: str) -> Sample:
    return Sample(step, "rows.jsonl:1", "score", 0.5, "Wie geht\u2019s?\n", "gut", answer, ended=False)


def test_samples_stand_in_the_order_of_steps(tmp_path: Path) -> None:
    """What is written again, by a run that resumes, replaces what was there of that step and of later ones."""
    path = tmp_path / "samples.jsonl"
    assert read_lines(path, Sample) == []
    for step in (0, 2, 4):
        write_step(path, step, [sample(step, "a"), sample(step, "b")], Sample)
    assert [one.step for one in read_lines(path, Sample)] == [0, 0, 2, 2, 4, 4]
    write_step(path, 2, [sample(2, "again")], Sample)
    assert [(one.step, one.answer) for one in read_lines(path, Sample)] == [(0, "a"), (0, "b"), (2, "again")]
    assert read_lines(path, Sample)[-1] == sample(2, "again")
    cut_after(path, 0, Sample)
    assert [one.step for one in read_lines(path, Sample)] == [0, 0]


def test_damage_costs_only_the_damaged_lines(tmp_path: Path) -> None:
    """The report of a run must not fail because of them; without a file there is nothing to cut."""
    path = tmp_path / "samples.jsonl"
    write_step(path, 0, [sample(0, "kept")], Sample)
    torn = path.read_bytes()[:-20]
    whole = path.read_bytes().strip()
    wrong = [(b"0.5", b'"0.5"'), (b'"rows.jsonl:1"', b"7"), (b'"gut"', b"null"), (b'"kept"', b"1"), (b"false", b'"no"')]
    lines = [whole.replace(was, now) for was, now in wrong]
    assert all(line != whole for line in lines)
    lines += [b"\xff", b"null", b"[1]", b"{}", b"[" * 5000, path.read_bytes().replace(b"0,", b"null,", 1), torn]
    path.write_bytes(path.read_bytes() + b"\n".join(lines))
    assert read_lines(path, Sample) == [sample(0, "kept")]
    cut_after(tmp_path / "none.jsonl", 0, Sample)
    assert not (tmp_path / "none.jsonl").exists()
