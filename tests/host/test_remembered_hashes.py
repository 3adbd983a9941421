"""Hashes of files that are remembered: never of a file that may change within the same tick of the clock."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from uft_ds.data.rows import reading
from uft_ds.data.rows.reading import content_hash, find_data
from uft_ds.host import remembered_hashes
from uft_ds.host.files import sha256
from uft_ds.host.remembered_hashes import remembered_sha256


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are read, with a cache of this test alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found: list[Path] = []
    monkeypatch.setattr(remembered_hashes, "sha256", lambda path: found.append(path) or sha256(path))
    return found


def test_a_file_that_has_just_changed_is_not_remembered(
    tmp_path: Path, read: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its size and times could be the same after the next change; once it has settled, it is read once more."""
    path = tmp_path / "rows.jsonl"
    path.write_text("a")
    assert remembered_sha256(path) == remembered_sha256(path) == sha256(path)
    assert len(read) == 2
    monkeypatch.setattr(time, "time", lambda: path.stat().st_ctime + 3.0)
    assert remembered_sha256(path) == remembered_sha256(path) == sha256(path)
    assert len(read) == 3


def test_a_large_file_of_rows_is_hashed_once(tmp_path: Path, read: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Through a link too; a change is seen, though size and modification time are set back."""
    monkeypatch.setattr(remembered_hashes, "SETTLED_SECONDS", -1.0)
    monkeypatch.setattr(reading, "_REMEMBERED_FROM_BYTES", 10)
    path, link = tmp_path / "rows.jsonl", tmp_path / "link.jsonl"
    path.write_text('{"a": 1}\n' * 3)
    link.symlink_to(path)
    first = content_hash(find_data(str(path), None))
    assert content_hash(find_data(str(link), None)) == first
    assert len(read) == 1
    times = path.stat()
    path.write_text('{"a": 2}\n' * 3)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert content_hash(find_data(str(path), None)) != first
