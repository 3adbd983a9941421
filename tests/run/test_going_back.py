"""What a resume removes from a run's folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoints import whole_checkpoint

from uft_ds.checkpoint.state import Position, TrainerState
from uft_ds.errors import UserError
from uft_ds.recipe.file import recipe_from_tree
from uft_ds.recipe.settings import Settings
from uft_ds.recipe.to_settings import settings_of
from uft_ds.record.lines_of_steps import read_lines, write_step
from uft_ds.record.run_folder import RunFolder
from uft_ds.record.samples import Sample
from uft_ds.run.resume import _go_back_to, resumed_from


def at(metrics_bytes: int) -> Position:
    return Position(TrainerState(2, 0), metrics_bytes)


def test_what_was_written_after_the_checkpoint_goes(tmp_path: Path) -> None:
    """Results of later steps would stand beside the metrics of earlier ones; the user's own files stay."""
    folder = RunFolder(tmp_path)
    older, newer = (whole_checkpoint(folder.checkpoints / f"step-00000{step}") for step in (2, 4))
    written_anew = ("DONE", "status.json", "report.html", "curves.png", "health.png", "held_out.csv")
    for name in (*written_anew, "notes.txt"):
        (tmp_path / name).write_text("of step 4")
    folder.metrics.write_text('{"step": 2}\n{"step": 4}\n')
    for step in (2, 4):
        write_step(
            folder.samples, step, [Sample(step, "rows.jsonl:1", "score", 0.5, "p", "r", "a", ended=True)], Sample
        )
    data = {"sources": [{"format": "jsonl", "path": "rows.jsonl"}]}
    tree = {"name": "x", "model": {"base": "base"}, "data": data, "output": str(tmp_path)}
    _go_back_to(older, folder, settings_of(recipe_from_tree(tree, "x")), at(len('{"step": 2}\n')))
    assert [name for name in written_anew if (tmp_path / name).exists()] == []
    assert (tmp_path / "notes.txt").exists()
    assert folder.metrics.read_text() == '{"step": 2}\n'
    assert [sample.step for sample in read_lines(folder.samples, Sample)] == [2]
    assert not newer.exists()
    assert folder.latest.resolve() == older


def settings_at(folder: RunFolder) -> Settings:
    data = {"sources": [{"format": "jsonl", "path": "rows.jsonl"}]}
    tree = {"name": "x", "model": {"base": "base"}, "data": data, "output": str(folder.path)}
    return settings_of(recipe_from_tree(tree, "x"))


def test_a_run_that_was_copied_without_links_goes_on(tmp_path: Path) -> None:
    """`latest` is a folder there: the status, the report and the curves are not lost before a failure."""
    folder = RunFolder(tmp_path)
    checkpoint = whole_checkpoint(folder.checkpoints / "step-000002")
    whole_checkpoint(folder.latest)
    _go_back_to(checkpoint, folder, settings_at(folder), at(0))
    assert folder.latest.readlink() == Path("checkpoints/step-000002")
    assert (tmp_path / "latest.copied" / "manifest.json").exists()


def test_nothing_is_removed_where_something_cannot_be(tmp_path: Path) -> None:
    """A folder in the place of the report: the status stays."""
    folder = RunFolder(tmp_path)
    checkpoint = whole_checkpoint(folder.checkpoints / "step-000002")
    (tmp_path / "status.json").write_text("of step 4")
    (tmp_path / "report.html").mkdir()
    with pytest.raises(UserError, match=r"report\.html: a folder, expected a file"):
        _go_back_to(checkpoint, folder, settings_at(folder), at(0))
    assert (tmp_path / "status.json").read_text() == "of step 4"


@pytest.mark.parametrize("text", ["", "null", "{}", "[" * 10_000])
def test_a_record_of_a_resume_that_cannot_be_read_is_named(tmp_path: Path, text: str) -> None:
    """Every rank reads it."""
    folder = RunFolder(tmp_path)
    assert resumed_from(folder) is None
    folder.resumed.write_text(text)
    with pytest.raises(UserError, match=r"resumed\.json: cannot be read"):
        resumed_from(folder)
