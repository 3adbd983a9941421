"""What a resume removes from a run's folder."""

from __future__ import annotations

from pathlib import Path

from checkpoints import whole_checkpoint

from uft_ds.recipe.file import recipe_from_tree
from uft_ds.recipe.settings import settings_of
from uft_ds.record.run_folder import RunFolder
from uft_ds.run.resume import _go_back_to


def test_what_was_written_after_the_checkpoint_goes(tmp_path: Path) -> None:
    """Results of later steps would stand beside the metrics of earlier ones; the user's own files stay."""
    folder = RunFolder(tmp_path)
    older, newer = (whole_checkpoint(folder.checkpoints / f"step-00000{step}") for step in (2, 4))
    written_anew = ("DONE", "status.json", "report.html", "curves.png", "health.png", "held_out.csv")
    for name in (*written_anew, "notes.txt"):
        (tmp_path / name).write_text("of step 4")
    folder.metrics.write_text('{"step": 2}\n{"step": 4}\n')
    data = {"sources": [{"format": "jsonl", "path": "rows.jsonl"}]}
    tree = {"name": "x", "model": {"base": "base"}, "data": data, "output": str(tmp_path)}
    _go_back_to(older, folder, settings_of(recipe_from_tree(tree, "x")), len('{"step": 2}\n'))
    assert [name for name in written_anew if (tmp_path / name).exists()] == []
    assert (tmp_path / "notes.txt").exists()
    assert folder.metrics.read_text() == '{"step": 2}\n'
    assert not newer.exists()
    assert folder.latest.resolve() == older
