"""A damaged checkpoint is found, and the damaged file named."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
from checkpoints import files_below

from uft_ds.checkpoint.manifest import MANIFEST, manifest_problem, write_manifest
from uft_ds.host.files import sha256


def checkpoint_at(folder: Path) -> Path:
    """Three small files, one empty and one in a folder below."""
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "weights").write_bytes(bytes(range(16)))
    (folder / "trainer.json").write_text('{"step": 2}\n')
    (folder / "empty").touch()
    write_manifest(folder, files_below(folder))
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return checkpoint_at(tmp_path / "step-000002")


def test_an_untouched_checkpoint_has_no_problem(checkpoint: Path) -> None:
    """Sizes and digests of all files below, not of the manifest itself; also after the folder was moved."""
    assert manifest_problem(checkpoint) is None
    files = json.loads((checkpoint / MANIFEST).read_text())["files"]
    assert set(files) == {"adapter/weights", "trainer.json", "empty"}
    assert files["adapter/weights"] == {
        "bytes": 16,
        "sha256": "be45cb2605bf36bebde684841a28f0fd43c69850a3dce5fedba69928ee3a8991",
    }
    moved = checkpoint.rename(checkpoint.with_name("elsewhere"))
    assert manifest_problem(moved) is None


def test_a_manifest_without_a_version_is_of_the_first(checkpoint: Path) -> None:
    """As a run of the first versions wrote it; its files are compared as ever."""
    content = json.loads((checkpoint / MANIFEST).read_text())
    (checkpoint / MANIFEST).write_text(json.dumps({"files": content["files"]}))
    assert manifest_problem(checkpoint) is None
    (checkpoint / "empty").write_text("x")
    assert manifest_problem(checkpoint) == f"{checkpoint / 'empty'}: 1 bytes, 0 recorded"


def test_the_digest_is_the_content(tmp_path: Path) -> None:
    """SHA-256 of nothing is e3b0c442...b855."""
    (tmp_path / "empty").touch()
    assert sha256(tmp_path / "empty") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


@pytest.mark.parametrize("name", ["adapter/weights", "trainer.json", MANIFEST])
def test_every_flipped_bit_is_found(checkpoint: Path, name: str) -> None:
    """Each bit of each file in turn, and of the manifest itself, the longest, every fifth: always a problem, never an
    exception."""
    path = checkpoint / name
    good = path.read_bytes()
    for bit in range(0, 8 * len(good), 5 if name == MANIFEST else 1):
        flipped = bytearray(good)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        problem = manifest_problem(checkpoint)
        assert problem is not None, (bit, bytes(flipped))
        if name != MANIFEST:
            assert problem == f"{path}: its content is not what was written"
    path.write_bytes(good)
    assert manifest_problem(checkpoint) is None


@pytest.mark.parametrize("name", ["adapter/weights", "trainer.json"])
def test_truncation_is_found_and_told_in_bytes(checkpoint: Path, name: str) -> None:
    """Cut to any length, or grown by a byte: the message has the path and both sizes."""
    path = checkpoint / name
    good = path.read_bytes()
    for content in [*(good[:length] for length in range(len(good))), good + b"\0"]:
        path.write_bytes(content)
        assert manifest_problem(checkpoint) == f"{path}: {len(content)} bytes, {len(good)} recorded"


@pytest.mark.parametrize("name", ["adapter/weights", "trainer.json", "empty"])
def test_a_missing_file_is_named(checkpoint: Path, name: str) -> None:
    """Deleted, or a folder in its place."""
    (checkpoint / name).unlink()
    assert manifest_problem(checkpoint) == f"{checkpoint / name}: missing"
    (checkpoint / name).mkdir()
    assert manifest_problem(checkpoint) == f"{checkpoint / name}: missing"


def test_without_a_manifest_a_checkpoint_was_never_finished(checkpoint: Path, tmp_path: Path) -> None:
    """It is written last; a folder that does not exist is no different."""
    (checkpoint / MANIFEST).unlink()
    assert manifest_problem(checkpoint) == f"{checkpoint / MANIFEST}: missing; the checkpoint was never finished"
    assert manifest_problem(tmp_path / "nowhere") is not None


@pytest.mark.parametrize(
    "text",
    ["", "{", "null", "[]", "{}", '{"files": null}', '{"files": []}', '{"files": "ab"}', '{"files": {"empty": null}}',
     '{"files": {"empty": {"bytes": 0}}}', '{"files": {"empty": [0, "e3b0"]}}', "\xff\xfe"],
)  # fmt: skip
def test_a_garbled_manifest_is_named(checkpoint: Path, text: str) -> None:
    """Whatever stands in it instead: one line that names the manifest, no exception."""
    (checkpoint / MANIFEST).write_bytes(text.encode("latin-1"))
    assert manifest_problem(checkpoint) == f"{checkpoint / MANIFEST}: not a manifest"


@pytest.mark.parametrize("name", ["../secret", "adapter/../../secret", "/etc/hostname", ".", ""])
def test_nothing_outside_of_the_folder_is_read(checkpoint: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A manifest comes with a checkpoint from elsewhere: a name that leads out is refused before any file is opened."""
    (checkpoint.parent / "secret").write_text("x")
    content = json.loads((checkpoint / MANIFEST).read_text())
    content["files"][name] = {"bytes": 1, "sha256": sha256(checkpoint.parent / "secret")}
    (checkpoint / MANIFEST).write_text(json.dumps(content))
    monkeypatch.setattr("uft_ds.checkpoint.manifest.sha256", lambda path: pytest.fail(f"{path} is read"))
    expected = f"names {name!r}, expected only files in the checkpoint's own folder"
    assert manifest_problem(checkpoint) == f"{checkpoint / MANIFEST}: {expected}"


def test_a_file_that_cannot_be_read_is_a_damaged_one(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fails under one checkpoint must not keep the others from being used."""

    def fails(path: Path) -> str:
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr("uft_ds.checkpoint.manifest.sha256", fails)
    problem = manifest_problem(checkpoint)
    assert problem == f"{checkpoint / 'adapter' / 'weights'}: cannot be read (Input/output error)"


def test_a_manifest_without_end_is_none(checkpoint: Path) -> None:
    """So deep that Python's reader gives up."""
    (checkpoint / MANIFEST).write_text("[" * 100_000)
    assert manifest_problem(checkpoint) == f"{checkpoint / MANIFEST}: not a manifest"
