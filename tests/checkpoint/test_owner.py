"""Whose a checkpoint is, and of which step: one of another run is not taken for the run's own."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from checkpoints import files_below, whole_checkpoint

from uft_ds.checkpoint.folder import checkpoint_problem, latest_checkpoint, newest_whole
from uft_ds.checkpoint.manifest import write_manifest
from uft_ds.checkpoint.owner import Owner, owner_of
from uft_ds.checkpoint.state import Position, TrainerState, write_position
from uft_ds.errors import UserError
from uft_ds.record.run_folder import RunFolder

OURS = Owner("a" * 64, "b" * 64)


def checkpoint_of(run: Path, step: int, owner: Owner | None, *, called: int | None = None) -> Path:
    """A whole checkpoint that states a step and an owner, in the folder of the same step or of another one."""
    checkpoint = whole_checkpoint(run / "checkpoints" / f"step-{step if called is None else called:06d}")
    write_position(checkpoint, Position(TrainerState(step, 0), 0), owner)
    write_manifest(checkpoint, files_below(checkpoint))
    return checkpoint


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with one checkpoint of its own."""
    folder = tmp_path / "run"
    checkpoint_of(folder, 2, OURS)
    RunFolder(folder).identity.write_text(json.dumps({"run": asdict(OURS), "base": {}}))
    return folder


@pytest.mark.parametrize(
    ("owner", "problem"),
    [
        (Owner("c" * 64, "b" * 64), "is of another run, with another recipe"),
        (Owner("a" * 64, "c" * 64), "is of another run, with another base or data"),
        (None, "does not say whose it is"),
    ],
)
def test_a_checkpoint_of_another_run_is_not_taken(run: Path, owner: Owner | None, problem: str) -> None:
    """Copied into the wrong folder, whole and newer: a resume goes back to the run's own, a conversion refuses."""
    foreign = checkpoint_of(run, 4, owner)
    found = checkpoint_problem(foreign)
    assert found is not None
    assert found.startswith(f"{foreign / 'trainer.json'}: {problem}")
    assert newest_whole(run) == (
        run / "checkpoints" / "step-000002",
        [f"checkpoint step-000004 cannot be used: {found}"],
    )
    with pytest.raises(UserError, match="step-000004 cannot be used"):
        latest_checkpoint(run)


def test_a_checkpoint_of_another_step_is_not_taken(run: Path) -> None:
    """The folder's name decides which is the newest; the step inside decides where training goes on."""
    renamed = checkpoint_of(run, 2, OURS, called=4)
    assert checkpoint_problem(renamed) == f"{renamed / 'trainer.json'}: is of step 2, its folder is called step-000004"


def test_what_is_the_runs_own_is_taken(run: Path, tmp_path: Path) -> None:
    """Its own checkpoints, a copy of one beside no run, and all of a run that began before owners were recorded."""
    assert checkpoint_problem(run / "checkpoints" / "step-000002") is None
    copy = (run / "checkpoints" / "step-000002").rename(tmp_path / "copy")
    assert checkpoint_problem(copy) is None
    RunFolder(run).identity.write_text(json.dumps({"base": {}}))
    assert checkpoint_problem(checkpoint_of(run, 4, None)) is None
    assert owner_of(RunFolder(run)) is None


@pytest.mark.parametrize("text", ["", "[]", '{"run": 5}', '{"run": {"recipe": "a"}}', "\xff"])
def test_a_record_that_cannot_be_read_is_named(run: Path, text: str) -> None:
    """A run that writes checkpoints needs it."""
    RunFolder(run).identity.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"identity\.json: cannot be read"):
        owner_of(RunFolder(run))
