"""Checkpoints by hand: what is there, what is damaged, and what may be deleted."""

from __future__ import annotations

import errno
import fcntl
import io
from pathlib import Path

import pytest
from checkpoints import whole_checkpoint
from rich.console import Console

from uft_ds.checkpoint.folder import checkpoint_problem, checkpoints_of, point_latest, prune, set_aside
from uft_ds.checkpoint.listing import delete, listed, problems_of
from uft_ds.errors import UserError
from uft_ds.record.run_folder import RunFolder, claim


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """Three checkpoints, the newest of which `latest` leads to."""
    folder = RunFolder(tmp_path / "run")
    for step in (2, 10, 1_000_000):
        whole_checkpoint(folder.checkpoints / f"step-{step:06d}")
    folder.lock.touch()
    folder.latest.symlink_to(Path("checkpoints") / "step-1000000")
    return folder


def shown(path: Path) -> str:
    console = Console(file=io.StringIO(), width=300)
    console.print(listed(path))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_list_says_step_and_state(run: RunFolder) -> None:
    """The newest first, by number and not by name; a damaged one with its file."""
    (run.checkpoints / "step-000002" / "trainer.json").write_text("{}")
    rows = [line.split() for line in shown(run.path).splitlines() if line.strip()][2:]
    assert [row[0] for row in rows] == ["1000000", "10", "2"]
    assert rows[0][1] == "(latest)"
    assert "recorded" in shown(run.path).splitlines()[-2]
    assert problems_of(run.path) == [
        f"step-000002: {run.checkpoints / 'step-000002' / 'trainer.json'}: 2 bytes, 13 recorded"
    ]
    assert not problems_of(run.checkpoints / "step-000010")


def test_one_checkpoint_is_listed_whatever_it_is_called(run: RunFolder, tmp_path: Path) -> None:
    """By the link to the newest, or a copy under another name."""
    assert [line.split()[0] for line in shown(run.latest).splitlines() if line.strip()][2:] == ["1000000"]
    whole_checkpoint(tmp_path / "copy")
    assert [line.split()[0] for line in shown(tmp_path / "copy").splitlines() if line.strip()][2:] == ["copy"]


def test_deleting_moves_latest(run: RunFolder) -> None:
    """To the newest that is left; with the last one it goes."""
    assert delete(run.path, [1_000_000, 2]) == [run.checkpoints / "step-1000000", run.checkpoints / "step-000002"]
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-000010"]
    assert run.latest.resolve().name == "step-000010"
    delete(run.path, [10])
    assert not run.latest.is_symlink()
    with pytest.raises(UserError, match="holds no checkpoint"):
        listed(run.path)


def test_what_is_set_aside_is_listed_and_may_be_deleted(run: RunFolder) -> None:
    """Where its step has been written again, that one goes first."""
    set_aside(run.checkpoints / "step-000010")
    whole_checkpoint(run.checkpoints / "step-000010")
    set_aside(run.checkpoints / "step-000002")
    rows = [line.split() for line in shown(run.path).splitlines() if line.strip()][2:]
    assert [row[0] for row in rows] == ["1000000", "10", "10", "2"]
    assert "set aside as step-000002.damaged" in shown(run.path)
    set_aside(run.checkpoints / "step-1000000")
    assert not problems_of(run.path), "renamed, but whole"
    (run.checkpoints / "step-1000000.damaged").rename(run.checkpoints / "step-1000000")
    assert [path.name for path in delete(run.path, [2, 10])] == ["step-000002.damaged", "step-000010"]
    assert [path.name for path in delete(run.path, [10])] == ["step-000010.damaged"]
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-1000000"]


def test_nothing_is_deleted_that_was_not_meant(run: RunFolder, tmp_path: Path) -> None:
    """A step that is not there, a run that is going on, a folder that is no run."""
    with pytest.raises(UserError, match="no checkpoint of step 3; there are 1000000, 10, 2"):
        delete(run.path, [10, 3])
    with run.lock.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="in use by a run that is still running"):
            delete(run.path, [10])
    with pytest.raises(UserError, match="not the folder of a run"):
        delete(tmp_path, [10])
    assert len(list(run.checkpoints.iterdir())) == 3


@pytest.mark.parametrize("is_pruned", [False, True])
def test_a_checkpoint_on_another_disk_keeps_its_files(run: RunFolder, tmp_path: Path, is_pruned: bool) -> None:
    """Moved away and linked back: the link goes, what it leads to stays whole."""
    elsewhere = (run.checkpoints / "step-000002").rename(tmp_path / "elsewhere")
    (run.checkpoints / "step-000002").symlink_to(elsewhere)
    if is_pruned:
        prune(run, keep=2, best=None)
    else:
        delete(run.path, [2])
    assert [path.name for path in checkpoints_of(run.path)] == ["step-1000000", "step-000010"]
    assert checkpoint_problem(elsewhere) is None


def test_a_link_is_set_aside_as_a_link(run: RunFolder, tmp_path: Path) -> None:
    """And one that was set aside before makes room, without its files."""
    for name in ("first", "second"):
        elsewhere = (run.checkpoints / "step-000002").rename(tmp_path / name)
        (run.checkpoints / "step-000002").symlink_to(elsewhere)
        set_aside(run.checkpoints / "step-000002")
        whole_checkpoint(run.checkpoints / "step-000002")
    assert (run.checkpoints / "step-000002.damaged").readlink() == tmp_path / "second"
    assert all(checkpoint_problem(tmp_path / name) is None for name in ("first", "second"))


def test_a_copied_latest_is_put_aside(run: RunFolder) -> None:
    """`cp -L` makes a folder of the link: it is kept under another name, a second one too."""
    for _ in range(2):
        run.latest.unlink()
        whole_checkpoint(run.latest)
        point_latest(run)
        assert run.latest.resolve().name == "step-1000000"
    assert checkpoint_problem(run.path / "latest.copied") is None
    assert checkpoint_problem(run.path / "latest.copied.2") is None
    claim(run, overwrite=True).close()
    assert not list(run.path.glob("latest*")), "--overwrite deletes what is a run's"


def test_without_locks_nothing_is_deleted(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the run goes on is not known then: it is not called going on, and the way out is said."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(UserError, match=r"cannot be locked .*No locks available.*is not known.*checkpoints yourself"):
        delete(run.path, [10])
    assert len(list(run.checkpoints.iterdir())) == 3
