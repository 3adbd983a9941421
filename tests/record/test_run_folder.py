"""Who owns a run's folder, what may be deleted in it, and how its end is told."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from uft_ds.errors import UserError
from uft_ds.host.files import write_atomically
from uft_ds.record import run_folder
from uft_ds.record.metrics_file import read_metrics
from uft_ds.record.run_folder import (
    RunFolder,
    Status,
    check_claimable,
    check_own_files,
    claim,
    claim_again,
    is_owned,
    reading_identity,
    release,
)

HOLD_THE_LOCK = """
import sys
from pathlib import Path
from uft_ds.record.run_folder import RunFolder, claim
lock = claim(RunFolder(Path(sys.argv[1])), overwrite=False)
print("held", flush=True)
sys.stdin.read()
"""


def finished_run(path: Path) -> RunFolder:
    """A folder with everything that a run leaves, a half-written file too, and three files of the user's own."""
    folder = RunFolder(path)
    claim(folder, overwrite=False).close()
    for name in ("recipe.yaml", "environment.json", "metrics.jsonl", "log-rank0.txt", "log-rank11.txt", "report.html",
                 "curves.png", "launcher.log", "DONE", "status.json"):  # fmt: skip
        (path / name).write_text("old")
    for name in ("checkpoints/step-000002/adapter", "tensorboard", "data"):
        (path / name).mkdir(parents=True)
        (path / name / "file").write_text("old")
    folder.latest.symlink_to("checkpoints/step-000002")
    (path / ".recipe.yaml.tmp").write_text("half")
    (path / "notes.md").write_text("mine")
    (path / "thesis.tmp").write_text("mine")
    (path / "plots").mkdir()
    (path / "plots" / "data").write_text("mine")
    return folder


def contents(path: Path) -> set[str]:
    return {str(entry.relative_to(path)) for entry in path.rglob("*")}


@contextmanager
def another_process_owning(path: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLD_THE_LOCK, str(path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate(timeout=10)


def test_a_fresh_folder_is_made(tmp_path: Path) -> None:
    """Parents too, and it holds nothing but the lock; an empty folder is as good."""
    with claim(RunFolder(tmp_path / "a" / "b"), overwrite=False):
        assert contents(tmp_path / "a" / "b") == {".uft-run"}
    (tmp_path / "empty").mkdir()
    claim(RunFolder(tmp_path / "empty"), overwrite=False).close()


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["thesis.tex", "recipe.yaml", "data", "DONE"])
def test_a_foreign_folder_is_refused(tmp_path: Path, name: str, overwrite: bool) -> None:
    """--overwrite or not, nothing in it changes: a recipe.yaml or data of the user's own does not make it a run."""
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=r"^output: .* holds files that are not from a run of uft"):
        claim(RunFolder(tmp_path), overwrite=overwrite)
    assert contents(tmp_path) == {name}
    assert (tmp_path / name).read_text() == "mine"


def test_a_file_is_refused(tmp_path: Path) -> None:
    """An output that is a file, or lies below one."""
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"is a file, expected a folder"):
        claim(RunFolder(tmp_path / "file"), overwrite=True)
    with pytest.raises(UserError, match=r"^output: .* cannot be written \(Not a directory\)"):
        claim(RunFolder(tmp_path / "file" / "below"), overwrite=True)


def test_a_run_is_not_overwritten_unasked(tmp_path: Path) -> None:
    """The message offers both ways out, and the run stays as it was."""
    folder = finished_run(tmp_path / "run")
    before = contents(folder.path)
    with pytest.raises(UserError, match=r"already holds a run.* delete it with --overwrite, .* output=PATH"):
        claim(folder, overwrite=False)
    assert contents(folder.path) == before


def test_overwrite_deletes_the_run_and_nothing_else(tmp_path: Path) -> None:
    """What a run writes is gone, files of the user's own stay; the folder is locked meanwhile."""
    folder = finished_run(tmp_path / "run")
    with claim(folder, overwrite=True):
        assert contents(folder.path) == {".uft-run", "notes.md", "plots", "plots/data", "thesis.tmp"}


def test_overwrite_does_not_follow_links(tmp_path: Path) -> None:
    """Checkpoints that lie on another disk, behind a link: the link goes, what it points to stays."""
    folder = finished_run(tmp_path / "run")
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "weights").write_text("mine")
    (folder.path / "wandb").symlink_to(tmp_path / "disk")
    claim(folder, overwrite=True).close()
    assert not (folder.path / "wandb").is_symlink()
    assert (tmp_path / "disk" / "weights").read_text() == "mine"


def test_a_start_that_never_trained_does_not_block_its_folder(tmp_path: Path) -> None:
    """Stopped while it loaded, or after the evaluation of step 0, or a full disk while the data was written."""
    folder = RunFolder(tmp_path / "run")
    for left in ({}, {"metrics.jsonl": ""}, {"metrics.jsonl": '{"step": 0, "held_out/loss": 0.25}\n'}):
        claim(folder, overwrite=False).close()
        (folder.path / "data").mkdir()
        (folder.path / "data" / "report.json").write_text("half")
        for name, text in left.items():
            (folder.path / name).write_text(text)
        check_claimable(folder, overwrite=False)
        with claim(folder, overwrite=False):
            assert contents(folder.path) == {".uft-run"}


@pytest.mark.parametrize(
    "left",
    [
        {"metrics.jsonl": '{"step": 0}\n{"step": 1, "loss": 0.2}\n'},
        {"metrics.jsonl": '{"step": 0}\n{"st'},
        {"checkpoints/step-000002.damaged": ""},
        {"DONE": ""},
    ],
)
def test_one_step_is_something_to_lose(tmp_path: Path, left: dict[str, str]) -> None:
    """So are a checkpoint, and a file that cannot be read."""
    folder = RunFolder(tmp_path / "run")
    claim(folder, overwrite=False).close()
    for name, text in left.items():
        (folder.path / name).parent.mkdir(exist_ok=True)
        (folder.path / name).write_text(text)
    before = contents(folder.path)
    with pytest.raises(UserError, match="already holds a run"):
        check_claimable(folder, overwrite=False)
    with pytest.raises(UserError, match="already holds a run"):
        claim(folder, overwrite=False)
    assert contents(folder.path) == before


def test_a_start_that_still_loads_is_not_taken_for_one_that_never_trained(tmp_path: Path) -> None:
    """Said before the data is read, by its lock."""
    with another_process_owning(tmp_path / "run"), pytest.raises(UserError, match="in use by a run that is still"):
        check_claimable(RunFolder(tmp_path / "run"), overwrite=False)


def test_a_folder_in_use_by_another_process_is_refused(tmp_path: Path) -> None:
    """Also with --overwrite, and nothing is deleted; free again once the owner was killed."""
    folder = RunFolder(tmp_path / "run")
    with another_process_owning(folder.path):
        (folder.path / "metrics.jsonl").write_text("growing")
        with pytest.raises(UserError, match=r"is in use by a run that is still running"):
            claim(folder, overwrite=True)
        assert folder.metrics.read_text() == "growing"
    claim(folder, overwrite=True).close()
    assert not folder.metrics.exists()


def without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)


def test_a_file_system_without_locks_is_not_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says what is missing and what to do, and a folder that was made for the run is not called in use."""
    without_locks(monkeypatch)
    folder = RunFolder(tmp_path / "run")
    for take in (lambda: claim(folder, overwrite=False), lambda: claim_again(folder)):
        with pytest.raises(UserError, match=r"^output: .*/run cannot be locked .*No locks available.*output=PATH"):
            take()
    assert is_owned(folder) is None


def test_a_lock_that_is_a_link_is_refused(tmp_path: Path) -> None:
    """--overwrite deletes no link's target and empties none either: whoever may write the folder chose the link."""
    folder = finished_run(tmp_path / "run")
    (tmp_path / "outside.txt").write_text("mine")
    folder.lock.unlink()
    folder.lock.symlink_to(tmp_path / "outside.txt")
    with pytest.raises(UserError, match=r"^output: .*/run cannot be written \(\.uft-run is a link"):
        claim(folder, overwrite=True)
    with pytest.raises(UserError, match=r"\.uft-run is a link"):
        is_owned(folder)
    assert (tmp_path / "outside.txt").read_text() == "mine"
    assert folder.metrics.read_text() == "old"


def test_a_released_lock_is_not_shared(tmp_path: Path) -> None:
    """Whoever waited for a run that never began locks the folder anew, and a third one is kept out."""
    folder = RunFolder(tmp_path / "run")
    first = claim(folder, overwrite=False)
    (folder.path / "notes.md").write_text("mine")  # so that the folder stays
    releasing = threading.Timer(0.3, release, (folder, first))
    releasing.start()
    with claim_again(folder), pytest.raises(UserError, match="in use"):
        claim_again(folder)
    releasing.join()


def test_closing_the_lock_frees_the_folder(tmp_path: Path) -> None:
    """One process may hold it at a time, and the next one after it was closed."""
    folder = RunFolder(tmp_path / "run")
    with claim(folder, overwrite=False), pytest.raises(UserError, match="in use"):
        claim(folder, overwrite=True)
    claim(folder, overwrite=True).close()


def test_release_leaves_nothing_of_a_run_that_never_began(tmp_path: Path) -> None:
    """The folder itself goes too, unless it holds something of the user's; then it can be claimed again."""
    folder = RunFolder(tmp_path / "run")
    lock = claim(folder, overwrite=False)
    folder.recipe.write_text("half")
    release(folder, lock)
    assert lock.closed
    assert not folder.path.exists()

    folder = finished_run(tmp_path / "mixed")
    release(folder, claim(folder, overwrite=True))
    assert contents(folder.path) == {"notes.md", "plots", "plots/data", "thesis.tmp"}


def test_the_first_status_stays(tmp_path: Path) -> None:
    """The first rank that fails knows why, the others only see its connections close; nothing else is left behind."""
    folder = RunFolder(tmp_path)
    folder.write_first_status(Status(3, "rank 1: the loss is NaN"))
    folder.write_first_status(Status(1, "rank 0: connection closed by peer"))
    assert folder.read_status() == Status(3, "rank 1: the loss is NaN")
    assert contents(tmp_path) == {"status.json"}


def test_the_first_status_stays_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on FAT, where the system refuses them: the reason of a failure is not lost, and no other file is left."""

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    folder = RunFolder(tmp_path)
    folder.write_first_status(Status(3, "rank 1: the loss is NaN"))
    folder.write_first_status(Status(1, "rank 0: connection closed by peer"))
    assert folder.read_status() == Status(3, "rank 1: the loss is NaN")
    assert contents(tmp_path) == {"status.json"}


def test_a_status_that_cannot_be_written_hides_no_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The folder is gone: nothing is raised in the place of the error that is being handled, and both are printed."""
    RunFolder(tmp_path / "gone").write_first_status(Status(1, "rank 0 crashed: division by zero"))
    said = capsys.readouterr().err
    assert "status.json cannot be written (No such file or directory): rank 0 crashed: division by zero" in said


def test_half_a_status_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk: the next rank that can write one still may."""

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        patch.setattr(os, "fsync", full)
        RunFolder(tmp_path).write_first_status(Status(1, "lost"))
    assert contents(tmp_path) == set()
    RunFolder(tmp_path).write_first_status(Status(1, "kept"))
    assert RunFolder(tmp_path).read_status() == Status(1, "kept")


def test_a_status_comes_back_as_it_was_written(tmp_path: Path) -> None:
    """Exit code and message, with every character of the message."""
    folder = RunFolder(tmp_path)
    assert folder.read_status() is None
    for status in (Status(3, 'rank 1: "NaN"\nβ = 0.1'), Status(0, "done")):
        folder.write_status(status)
        assert folder.read_status() == status


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"exit_code": 0}', '{"code": 0, "message": ""}', "\xff"])
def test_a_garbled_status_is_none(tmp_path: Path, text: str) -> None:
    """A run that left half a status died without a word."""
    (tmp_path / "status.json").write_bytes(text.encode("latin-1"))
    assert RunFolder(tmp_path).read_status() is None


def test_write_atomically_replaces_the_whole_text(tmp_path: Path) -> None:
    """Shorter than before leaves no tail, and no temporary file stays beside."""
    path = tmp_path / "file.json"
    for text in ("a long first text\n", "β\n"):
        write_atomically(path, text)
        assert path.read_text(encoding="utf-8") == text
    assert contents(tmp_path) == {"file.json"}


def test_a_failed_write_leaves_the_old_text(tmp_path: Path) -> None:
    """The text is replaced only once the new one is whole: here it cannot be encoded."""
    path = tmp_path / "file.json"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "new \ud800")
    assert path.read_text() == "old"


def test_checkpoints_that_are_not_there_now_are_no_reason_to_start_anew(tmp_path: Path) -> None:
    """A link to a disk that is not mounted, or a file in the folder's place: a resume would delete the run."""
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    folder.checkpoints.symlink_to(tmp_path / "disk")
    with pytest.raises(UserError, match=r"checkpoints: a link to .*disk, which is not there, expected the folder"):
        check_own_files(folder)
    (tmp_path / "disk").mkdir()
    check_own_files(folder)
    folder.checkpoints.unlink()
    folder.checkpoints.touch()
    with pytest.raises(UserError, match=r"checkpoints: a file, expected the folder that the run wrote; bring it back"):
        check_own_files(folder)


def test_a_run_that_cannot_be_deleted_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """shutil names the file without its folder, as on a read-only disk."""
    folder = finished_run(tmp_path / "run")

    def refuse(path: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system", "trainer.json")

    monkeypatch.setattr(run_folder.shutil, "rmtree", refuse)
    with pytest.raises(UserError) as caught:
        claim(folder, overwrite=True)
    assert str(caught.value) == f"output: {folder.path} cannot be emptied (trainer.json: Read-only file system)"


@pytest.mark.parametrize("name", ["metrics.jsonl", "launcher.log", "DONE", "log-rank1.txt"])
def test_nothing_is_written_through_a_link(tmp_path: Path, name: str) -> None:
    """A resume cuts, empties or appends to these files: through a link it would change a file outside of the run."""
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    check_own_files(folder)
    (folder.path / name).symlink_to(tmp_path / "outside")
    for _ in ("the link is dead", "it leads to a file"):
        with pytest.raises(UserError, match=rf"{name}: a link to .*outside, expected a file of the run's own"):
            check_own_files(folder)
        (tmp_path / "outside").write_text("mine")
    (folder.path / name).unlink()
    (folder.path / name).mkdir()
    with pytest.raises(UserError, match=rf"{name}: not a file"):
        check_own_files(folder)


def test_a_pipe_in_a_runs_folder_is_not_waited_for(tmp_path: Path) -> None:
    """A file that a run wrote is a file; one that is not is damaged, and says nothing."""
    folder = RunFolder(tmp_path)
    for path in (tmp_path / "status.json", folder.metrics, folder.identity):
        os.mkfifo(path)
    assert folder.read_status() is None
    assert read_metrics(folder.metrics) == []
    with pytest.raises(UserError, match=r"identity\.json: cannot be read"), reading_identity(folder):
        pass


@pytest.mark.parametrize("name", run_folder._OF_A_RUN)
def test_every_file_of_a_run_is_in_a_document(name: str) -> None:
    """What lies in a run's folder can be looked up: by its name, or as the folder in which it is described."""
    documents = (Path(__file__).parents[2] / "docs").glob("*.md")
    assert any(re.search(rf"[`/]{re.escape(name)}[`/]", path.read_text(encoding="utf-8")) for path in documents)
