"""A run's checkpoints: which one is the newest that is whole, and what is said of the others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoints import files_below, whole_checkpoint

from uft_ds.checkpoint.folder import (
    best_checkpoint,
    checkpoint_problem,
    checkpoints_of,
    latest_checkpoint,
    newest_whole,
    set_aside,
    step_of,
)
from uft_ds.checkpoint.manifest import write_manifest
from uft_ds.errors import UserError
from uft_ds.record.run_folder import RunFolder


def test_the_newest_checkpoint_is_taken(tmp_path: Path) -> None:
    """By step, from a run's folder, the checkpoint itself, or the link to the newest; not a half-written one."""
    for step in (2, 10, 9):
        whole_checkpoint(tmp_path / "checkpoints" / f"step-{step:06d}")
    (tmp_path / "checkpoints" / ".step-000012.tmp").mkdir()
    newest = tmp_path / "checkpoints" / "step-000010"
    assert latest_checkpoint(tmp_path) == newest
    older = tmp_path / "checkpoints" / "step-000002"
    assert latest_checkpoint(older) == older
    (tmp_path / "latest").symlink_to(Path("checkpoints") / "step-000010")
    assert latest_checkpoint(tmp_path / "latest") == newest, "a link leads to the run that it belongs to"


def test_a_damaged_newest_checkpoint_is_refused_and_older_ones_are_named(tmp_path: Path) -> None:
    """Going back without a word would change what is converted: the user is told what there is."""
    for step in (1, 2):
        whole_checkpoint(tmp_path / "checkpoints" / f"step-{step:06d}")
    (tmp_path / "checkpoints" / "step-000002" / "adapter" / "adapter_model.safetensors").write_bytes(bytes(34))
    with pytest.raises(UserError) as caught:
        latest_checkpoint(tmp_path)
    message = str(caught.value)
    assert "step-000002" in message
    assert "adapter_model.safetensors: its content is not what was written" in message
    assert message.endswith("older ones: step-000001")


def test_a_file_that_no_rank_wrote_is_damage(tmp_path: Path) -> None:
    """The states of ranks are read from all files of their folder."""
    checkpoint = whole_checkpoint(tmp_path / "checkpoints" / "step-000001")
    extra = checkpoint / "optimizer" / "rank-00000-of-00001.safetensors"
    extra.touch()
    assert checkpoint_problem(checkpoint) == f"{extra}: not in the manifest"


def test_a_run_without_checkpoints_is_refused(tmp_path: Path) -> None:
    """The message says what was expected."""
    with pytest.raises(UserError, match=r"holds no checkpoint; expected a run's folder or one of its checkpoints"):
        latest_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("gone", "problem"),
    [
        ("trainer.json", "does not list trainer.json"),
        ("adapter/adapter_model.safetensors", "does not list adapter/adapter_model.safetensors"),
        ("optimizer/rank-00001-of-00002.safetensors", "does not list the files of all ranks"),
        ("optimizer", "does not list the files of all ranks"),
        ("", "does not list trainer.json"),
    ],
)
def test_a_valid_manifest_of_too_few_files_is_none(tmp_path: Path, gone: str, problem: str) -> None:
    """Hand-made or cut at a line's end: what it lists is there, yet it is no checkpoint."""
    checkpoint = whole_checkpoint(tmp_path / "checkpoints" / "step-000001")
    assert checkpoint_problem(checkpoint) is None
    left = {name: written for name, written in files_below(checkpoint).items() if not name.startswith(gone)}
    write_manifest(checkpoint, left)
    found = checkpoint_problem(checkpoint)
    assert found is not None
    assert found.startswith(f"{checkpoint / 'manifest.json'}: {problem}")
    assert newest_whole(tmp_path) == (None, [f"checkpoint step-000001 cannot be used: {found}"])


def test_an_empty_folder_is_no_checkpoint(tmp_path: Path) -> None:
    """As a killed deletion leaves it."""
    whole = whole_checkpoint(tmp_path / "checkpoints" / "step-000001")
    (tmp_path / "checkpoints" / "step-000002").mkdir()
    newest, problems = newest_whole(tmp_path)
    assert newest == whole
    assert len(problems) == 1
    assert "step-000002/manifest.json: missing; the checkpoint was never finished" in problems[0]


def test_a_checkpoint_that_is_set_aside_counts_no_more(tmp_path: Path) -> None:
    """It is renamed, not deleted; an older one of the same name makes room."""
    for content in (b"first", b"second"):
        checkpoint = whole_checkpoint(tmp_path / "checkpoints" / "step-000001")
        (checkpoint / "mark").write_bytes(content)
        aside = set_aside(checkpoint)
        assert aside.name == "step-000001.damaged"
        assert (aside / "mark").read_bytes() == content
        assert not checkpoints_of(tmp_path)


@pytest.mark.parametrize(
    ("metric", "values", "best"),
    [
        ("held_out/loss", [0.3, 0.2, 0.2], 2),
        ("held_out/rank_correlation/score", [None, 0.1, 0.3], 3),
        ("held_out/logp_chosen/pair", [-10.0, -5.0, -20.0], 2),
        ("held_out/implicit_reward_chosen/pair", [0.0, -1.0, None], 1),
        ("held_out/length_correlation/score", [-0.5, 0.4, -0.3], 3),
        ("held_out/rank_correlation/score", [None, None, None], None),
    ],
)
def test_the_best_checkpoint_by_a_metric(
    tmp_path: Path, metric: str, values: list[float | None], best: int | None
) -> None:
    """By the metric's own direction; the earliest of equals, and never one at which it is undefined."""
    folder = RunFolder(tmp_path)
    with folder.metrics.open("w") as file:
        for step, value in enumerate(values, start=1):
            whole_checkpoint(tmp_path / "checkpoints" / f"step-{step:06d}")
            file.write(json.dumps({"step": step, metric: value}) + "\n")
    found = best_checkpoint(folder, metric)
    assert (None if found is None else step_of(found)) == best


@pytest.mark.parametrize(("values", "best"), [([0.5, 0.5, 0.5], 1), ([0.5, 0.4, 0.5], 2), ([0.6, 0.5, 0.4], 0)])
def test_an_untrained_checkpoint_wins_no_tie(tmp_path: Path, values: list[float], best: int) -> None:
    """Step 0 is the best only where every later one is worse."""
    folder = RunFolder(tmp_path)
    with folder.metrics.open("w") as file:
        for step, value in enumerate(values):
            whole_checkpoint(tmp_path / "checkpoints" / f"step-{step:06d}")
            file.write(json.dumps({"step": step, "held_out/pair_accuracy/pair": value}) + "\n")
    found = best_checkpoint(folder, "held_out/pair_accuracy/pair")
    assert found is not None
    assert step_of(found) == best
