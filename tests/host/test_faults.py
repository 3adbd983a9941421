"""How a command ends that raises what no part of it has explained."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

from uft_ds import cli
from uft_ds.host.faults import ending, lasting


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", "a/b.json"),
            "a/b.json: No such file or directory",
        ),
        (PermissionError(errno.EACCES, "Permission denied", Path("a/b")), "a/b: Permission denied"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "a", None, "b"), "a -> b: Is a directory"),
        (MemoryError(), "the memory of this machine is not enough"),
    ],
)
def test_what_can_be_foreseen_names_the_file(error: Exception, message: str) -> None:
    """The user can mend it: exit code 2."""
    assert ending(error) == (2, message)


def test_only_what_a_restart_meets_again_is_lasting() -> None:
    """A network's file system may answer again; a full disk and a missing file stay as they are."""
    assert lasting(OSError(errno.ENOSPC, "No space left on device", "a")) == "a: No space left on device"
    assert lasting(FileNotFoundError(errno.ENOENT, "No such file or directory", "a")) is not None
    for error in (OSError(errno.ESTALE, "Stale file handle", "a"), OSError(errno.EIO, "I/O error", "a"), MemoryError()):
        assert lasting(error) is None


def test_memory_that_torch_lacks_is_foreseen() -> None:
    """A rank of a billion, for example."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    code, message = ending(caught.value)
    assert code == 2
    assert message.startswith("the memory of this machine is not enough (")


def test_the_rest_is_a_fault_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 1, one line, and the traceback in a file; where none can be written, behind the line."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code, message = ending(KeyError("never"))
    (kept,) = tmp_path.iterdir()
    assert (code, message) == (
        1,
        f"KeyError: 'never': this is a fault of uft_ds; please report it with the traceback in {kept}",
    )
    assert kept.read_text().endswith("KeyError: 'never'\n")
    long = f"ValueError: {'a word ' * 42}a word ...: this is a fault of uft_ds"
    assert ending(ValueError("a word " * 99))[1].startswith(long), "300 letters at most, cut behind a word"
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    assert ending(KeyError("never"))[1].endswith("with this traceback:\nKeyError: 'never'\n")


def test_no_command_shows_a_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever it raises."""

    def fails() -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "rows.jsonl")

    monkeypatch.setattr(cli, "app", fails)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: rows.jsonl: Permission denied\n"


def test_a_name_that_no_file_can_have_is_cut() -> None:
    """A path of the user's: its beginning, and how long it is."""
    code, message = ending(OSError(errno.ENAMETOOLONG, "File name too long", "a/" + "x" * 300))
    assert code == 2
    assert message.startswith(f"a/{'x' * 78}...: no such file or folder")
    assert "300 bytes in one name, 302 in all" in message
