"""The shared store of reference log-probs: exact, safe beside other writers, suspicious of what it reads."""

import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from uft_ds.data.example import KEY_BYTES
from uft_ds.known.store import SECONDS_OF_A_DAY, LogpTable, ReferenceStore, Stored, read_table, set_aside, write_table

IDENTITY, OTHER = "a" * 64, "b" * 64


def table(count: int, *, seed: int = 0) -> LogpTable:
    rng = np.random.default_rng(seed)
    return {rng.bytes(KEY_BYTES): float(-rng.exponential(100)) for _ in range(count)}


@pytest.fixture
def store(tmp_path: Path) -> ReferenceStore:
    return ReferenceStore.below(tmp_path, IDENTITY)


def files(store: ReferenceStore) -> list[Path]:
    return sorted(store.folder.glob("*.safetensors"))


def test_what_is_read_is_what_was_written(store: ReferenceStore) -> None:
    """Bit for bit, over several files; an empty or absent store is an empty table; nothing new writes no file."""
    assert store.read() == Stored({}, (), ())
    store.write({})
    assert not store.folder.exists()
    first, second = table(50), table(30, seed=1)
    store.write(first)
    store.write(second)
    assert len(files(store)) == 2
    stored = store.read()
    assert (stored.table, stored.problems) == (first | second, ())
    assert sorted(stored.files) == files(store)
    store.write(first)
    assert len(files(store)) == 2, "the same content has the same name"
    assert all(path.stat().st_mode & 0o044 for path in files(store)), "others share the folder"


def test_what_a_killed_writer_left_is_deleted_after_a_day(store: ReferenceStore) -> None:
    """By the next writer; a file of today may be one that is being written."""
    store.write(table(1))
    old, young = store.folder / ".old.tmp", store.folder / ".young.tmp"
    for path in (old, young):
        path.write_bytes(b"half a table")
    os.utime(old, times=(0, time.time() - SECONDS_OF_A_DAY - 60))
    store.write(table(1, seed=1))
    assert (old.exists(), young.exists()) == (False, True)


def test_equal_tables_are_equal_files(tmp_path: Path) -> None:
    """In whatever order their log-probs became known."""
    known = table(20)
    for name, order in (("a", known), ("b", dict(reversed(known.items())))):
        write_table(tmp_path / name, order, IDENTITY)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert read_table(tmp_path / "b", IDENTITY) == known


def test_references_never_mix(tmp_path: Path, store: ReferenceStore) -> None:
    """Another reference has another folder; a file that was moved there is recognised by its metadata."""
    store.write(table(5))
    other = ReferenceStore.below(tmp_path, OTHER)
    assert other.read() == Stored({}, (), ())
    other.folder.mkdir()
    files(store)[0].rename(other.folder / files(store)[0].name)
    stored = other.read()
    assert (stored.table, stored.files) == ({}, ())
    assert len(stored.problems) == 1
    assert "belongs to another reference (aaaaaaaaaaaaaaaa, expected bbbbbbbbbbbbbbbb)" in stored.problems[0]
    assert other.read() == Stored({}, (), ()), "set aside, so it is said once"


@pytest.mark.parametrize("damage", ["bit", "cut", "empty", "text"])
def test_a_damaged_file_is_said_and_set_aside(store: ReferenceStore, damage: str) -> None:
    """A flipped bit in a log-prob passes safetensors; the name finds it. The other files are read as ever."""
    kept, lost = table(5), table(7, seed=1)
    store.write(kept)
    before = set(files(store))
    store.write(lost)
    (path,) = set(files(store)) - before
    content = path.read_bytes()
    damaged = {
        "bit": content[:-3] + bytes([content[-3] ^ 1]) + content[-2:],
        "cut": content[:-9],
        "empty": b"",
        "text": b"not a table",
    }[damage]
    path.chmod(0o644)
    path.write_bytes(damaged)
    stored = store.read()
    assert stored.table == kept
    assert set(stored.files) == before
    assert len(stored.problems) == 1
    assert str(path) in stored.problems[0]
    assert path.with_name(f"{path.name}.rejected").exists()
    assert store.read() == Stored(kept, stored.files, ())


@pytest.mark.parametrize(
    ("keys", "logps", "message"),
    [
        (np.zeros((2, KEY_BYTES), np.uint8), np.array([-1.0, np.nan]), "not finite"),
        (np.zeros((2, KEY_BYTES), np.uint8), np.zeros(2, np.float32), "found uint8[2, 16] and float32[2]"),
        (np.zeros((3, KEY_BYTES), np.uint8), np.zeros(2), "found uint8[3, 16]"),
        (np.zeros((2, 8), np.uint8), np.zeros(2), "found uint8[2, 8]"),
    ],
)
def test_a_table_of_another_form_is_refused(tmp_path: Path, keys: np.ndarray, logps: np.ndarray, message: str) -> None:
    """Whatever its hash says: types, shapes and values are looked at."""
    path = tmp_path / "table.safetensors"
    save_file({"keys": keys, "logps": logps}, path, metadata={"reference": IDENTITY})
    with pytest.raises(ValueError, match=r"table\.safetensors") as caught:
        read_table(path, IDENTITY)
    assert message in str(caught.value)
    save_file({"keys": keys}, path, metadata={"reference": IDENTITY})
    with pytest.raises(ValueError, match="not a table of reference log-probs"):
        read_table(path, IDENTITY)


def write_many(root: Path, seed: int) -> None:
    for i in range(20):
        ReferenceStore.below(root, IDENTITY).write(table(3, seed=1000 * seed + i))
        ReferenceStore.below(root, IDENTITY).read()


def test_writers_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    """Four processes, 20 files each, reading meanwhile: all 240 values are there, and no torn file was ever seen."""
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_many, args=(tmp_path, seed)) for seed in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(timeout=60)
        assert writer.exitcode == 0
    stored = ReferenceStore.below(tmp_path, IDENTITY).read()
    expected = {k: v for seed in range(4) for i in range(20) for k, v in table(3, seed=1000 * seed + i).items()}
    assert (stored.table, stored.problems) == (expected, ())
    assert not list(tmp_path.rglob("*.tmp")) + list(tmp_path.rglob("*.rejected"))


def test_a_killed_writer_leaves_nothing_that_is_read(store: ReferenceStore) -> None:
    """Its temporary file is never mistaken for a table."""
    store.write(table(3))
    write_table(store.folder / ".half.tmp", table(3, seed=9), IDENTITY)
    assert store.read() == Stored(table(3), tuple(files(store)), ())


def test_a_folder_that_cannot_be_written_is_an_os_error(tmp_path: Path) -> None:
    """The caller decides what becomes of the run; nothing is left half-written."""
    (tmp_path / IDENTITY[:32]).write_text("a file where the folder should be")
    store = ReferenceStore.below(tmp_path, IDENTITY)
    with pytest.raises(OSError, match="exist"):
        store.write(table(3))
    assert [path.name for path in tmp_path.iterdir()] == [IDENTITY[:32]]


def test_what_was_read_can_be_set_aside(store: ReferenceStore) -> None:
    """And nothing else: what others have written since is still read. Twice, as two runs might, is no error."""
    store.write(table(3))
    wrong = store.read().files
    store.write(table(4, seed=2))
    assert set_aside(wrong) == 1
    assert set_aside(wrong) == 0
    assert store.read().table == table(4, seed=2)
