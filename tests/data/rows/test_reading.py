"""Rows from files, folders and the hub: streamed, packed or not, each with its file and line."""

import gzip
import json
import time
import tracemalloc
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pytest
from reading_rows import PACK, TABLE_NAMES, Write, contents, refusal, write_table, zstd
from suites import long_but

from uft_ds.data.rows.reading import (
    SUFFIXES,
    RawRow,
    SourceFiles,
    content_hash,
    data_size,
    find_data,
    parse_row,
    raw_rows,
)
from uft_ds.errors import UserError

# Compression, and files that cannot be read


@pytest.mark.parametrize("packed", [".gz", ".zst"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-20],
        lambda data: data[:-1],
        lambda data: data[:2],
        lambda data: b"",
        lambda data: b'{"a": 1}\n',
    ],
    ids=["cut off", "one byte short", "a head", "empty", "in name only"],
)
def test_a_damaged_archive_is_refused(write: Write, packed: str, damage: Callable[[bytes], bytes]) -> None:
    """A truncated archive, or one in name only, does not pass for a short file."""
    data = damage(PACK[packed](b"".join(b'{"a": %d}\n' % i for i in range(1000))))
    for kind in ("jsonl", "json"):
        assert "cannot be read" in refusal(write(f"a.{kind}{packed}", data))


@pytest.mark.parametrize("packed", [".gz", ".zst"])
def test_an_archive_damaged_late_names_the_last_good_line(write: Write, packed: str) -> None:
    """Rows before the damage have been given by then, for the file is streamed."""
    good = PACK[packed](b'{"a": 1}\n' * 30_000)
    path = write(f"a.jsonl{packed}", good + good[:-3])
    rows: list[RawRow] = []
    with pytest.raises(UserError, match=r"\(.*\); is the copy complete\?$") as caught:
        rows.extend(raw_rows(find_data(str(path), None)))
    assert rows[-1].line >= 30_000
    assert str(caught.value).startswith(f"{path}: cannot be read after line {rows[-1].line} (")


def test_changed_bytes_in_an_archive_are_found_by_its_checksum(write: Write) -> None:
    """gzip always has one, zstd's command line writes one: here over the row with key a."""
    frame = bytes.fromhex("28b52ffd04584900007b2261223a20317d0a3387dfc3")
    assert [row for _, row in contents(write("good.jsonl.zst", frame))] == [{"a": 1}]
    assert "cannot be read" in refusal(write("bad.jsonl.zst", frame.replace(b"a", b"b")))
    stored = gzip.compress(b'{"a": 1}\n', compresslevel=0)
    assert "cannot be read" in refusal(write("bad.jsonl.gz", stored.replace(b'"a"', b'"b"')))


@pytest.mark.parametrize("packed", [".gz", ".zst"])
def test_archives_one_after_another_are_one_file(write: Write, packed: str) -> None:
    """`cat a.gz b.gz` is an archive; so is what parallel compressors write."""
    path = write(f"a.jsonl{packed}", PACK[packed](b'{"a": 1}\n{"a"') + PACK[packed](b": 2}\n"))
    assert contents(path) == [(f"{path}:1", {"a": 1}), (f"{path}:2", {"a": 2})]


def test_a_file_that_cannot_be_opened_is_refused(write: Write) -> None:
    """Also one that went away since it was found."""
    path = write("a.jsonl", b"{}\n")
    data = find_data(str(path), None)
    path.unlink()
    for use in (content_hash, data_size, lambda data: list(raw_rows(data))):
        with pytest.raises(UserError, match=r"a\.jsonl: cannot be read \(No such file or directory\)$"):
            use(data)


@pytest.mark.parametrize(
    ("name", "data"), [("a.jsonl", b""), ("a.jsonl", b"\n \n"), ("a.json", b"[ ]"), ("a.csv", b"a\n")]
)
def test_a_file_without_rows_is_refused(write: Write, name: str, data: bytes) -> None:
    """Nothing is trained on nothing."""
    assert refusal(write(name, data)).endswith("no rows; the file is empty")


# The hub


def fake_hub(monkeypatch: pytest.MonkeyPatch, data: datasets.Dataset, folder: str | None = None) -> None:
    def load(name: str, *, data_dir: str | None, split: str) -> datasets.Dataset:
        assert (name, data_dir, split) == ("who/what", folder, "train")
        return data

    monkeypatch.setattr(datasets, "load_dataset", load)


def test_rows_of_the_hub_carry_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """The split is train unless told, and a place names it."""
    rows = [{"a": i, "b": [str(i)]} for i in range(2345)]
    fake_hub(monkeypatch, datasets.Dataset.from_list(rows))
    found = contents("who/what")
    assert [row for _, row in found] == rows
    assert [place for place, _ in found] == [f"who/what[train]:{i}" for i in range(1, 2346)]


def test_a_folder_of_a_hub_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """What follows owner and name is a folder of the repository: HelpSteer2's preferences lie in one."""
    fake_hub(monkeypatch, datasets.Dataset.from_list([{"a": 1}]), "preference/more")
    assert contents("who/what/preference/more") == [("who/what/preference/more[train]:1", {"a": 1})]


def test_a_hub_data_set_is_known_by_its_content(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By its stored files and its split, or by its fingerprint where it has no files."""
    hashes = set()
    for rows in ([{"a": 1}], [{"a": 2}]):
        in_memory = datasets.Dataset.from_list(rows)
        in_memory.save_to_disk(tmp_path / str(rows[0]["a"]))
        stored = [datasets.load_from_disk(tmp_path / str(rows[0]["a"])) for _ in range(2)]
        for data in (in_memory, *stored):
            fake_hub(monkeypatch, data)
            found = find_data("who/what", None)
            hashes.add(content_hash(found))
            assert data_size(found) > 0
    assert len(hashes) == 4
    stored[0]._split = datasets.Split("train[:10%]")
    fake_hub(monkeypatch, stored[0])
    assert content_hash(find_data("who/what", None)) not in hashes


def test_a_hub_name_without_network_fails_at_once() -> None:
    """The message says that it is neither a path nor to be had, and what to do; no waiting for time-outs."""
    start = time.monotonic()
    message = refusal("nobody/no-such-data", "train")
    assert "neither a local file or folder, nor could it be loaded from the hub" in message
    assert "give a local path" in message
    assert "Traceback" not in message
    assert time.monotonic() - start < 30


def test_what_the_hub_refuses_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` wraps a cast error in a sentence without a cause; the network has nothing to do with it."""

    def load(name: str, *, data_dir: str | None, split: str) -> datasets.Dataset:
        cause = ValueError("Float value 0.500000 was truncated converting to int64")
        raise datasets.exceptions.DatasetGenerationError("An error occurred while generating the dataset") from cause

    monkeypatch.setattr(datasets, "load_dataset", load)
    message = refusal("who/what")
    assert "Float value 0.500000 was truncated converting to int64" in message
    assert "network" not in message


# Files and folders


def test_a_folder_gives_its_data_files_in_order(write: Write, tmp_path: Path) -> None:
    """All data files, sorted, those of folders below and of other kinds too; other files are ignored."""
    write("data/b.jsonl", b'{"a": 2}')
    write("data/a.json", b'[{"a": 1}]')
    write("data/sub/c.jsonl.gz", gzip.compress(b'{"a": 3}'))
    write("data/sub/d.json.zst", zstd(b'[{"a": 4}]'))
    write_table(tmp_path / "data" / "sub" / "e.arrow", [{"a": 5}])
    write("data/sub/f.csv", b"label\n6")
    write("data/README.md", b"no data")
    assert [row.get("a", row.get("label")) for _, row in contents(tmp_path / "data")] == [1, 2, 3, 4, 5, 6]


def test_a_place_is_what_the_user_gave_and_the_file_below(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths stay relative; line and row counts begin anew in each file."""
    folder = write("data/a.jsonl", b'{"a": 1}\n{"a": 2}').parent
    write("data/sub/b.jsonl", b'{"a": 3}')
    monkeypatch.chdir(folder.parent)
    expected = ["data/a.jsonl:1", "data/a.jsonl:2", "data/sub/b.jsonl:1"]
    for path in ("data", "data/"):
        assert [place for place, _ in contents(path)] == expected
    assert contents("./data/a.jsonl")[0][0] == "./data/a.jsonl:1"


def test_the_label_is_what_the_user_gave(write: Write) -> None:
    """With its split."""
    path = write("train.jsonl", b"{}")
    assert find_data(str(path), None).label == str(path)
    assert find_data(str(path.parent), "train").label == f"{path.parent}[train]"


def test_split_chooses_files_of_a_folder_by_name(write: Write, tmp_path: Path) -> None:
    """A split takes the files whose names begin with it; one that no file has is refused with the names."""
    write("data/train-0.jsonl", b'{"a": 1}')
    write("data/train-1.jsonl", b'{"a": 2}')
    write("data/test.jsonl", b'{"a": 3}')
    assert [row["a"] for _, row in contents(tmp_path / "data", "train")] == [1, 2]
    assert [row["a"] for _, row in contents(tmp_path / "data", "test")] == [3]
    message = refusal(tmp_path / "data", "validation")
    assert "whose name begins with 'validation'; data files found: test.jsonl, train-0.jsonl" in message


def test_a_folder_named_like_a_file_is_no_file(tmp_path: Path) -> None:
    """Spark writes a folder `train.parquet` of parts: each part's rows come once."""
    part = tmp_path / "train.parquet" / "part-0.parquet"
    part.parent.mkdir()
    write_table(part, [{"a": 1}, {"a": 2}])
    for folder in (tmp_path, part.parent):
        assert [place for place, _ in contents(folder)] == [f"{part}:1", f"{part}:2"]


def test_a_folder_without_data_is_refused(write: Write, tmp_path: Path) -> None:
    """The kinds of files that are read are named."""
    write("data/README.md", b"no data")
    assert f"no data file ({', '.join(SUFFIXES)})" in refusal(tmp_path / "data")


@pytest.mark.parametrize(
    "name", ["missing.jsonl", "missing/file.parquet", "a/b.csv", "a/b.arrow", "a/b.json.zst", "./missing", "missing"]
)
def test_a_missing_file_is_refused(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What looks like a path is not looked for on the hub."""
    monkeypatch.chdir(tmp_path)
    here = f"it is looked for in {tmp_path}, where the command was started"
    assert refusal(name) == f"{name}: no such file or folder; {here}"
    assert refusal(tmp_path / "missing.csv") == f"{tmp_path}/missing.csv: no such file or folder"


def test_a_path_too_long_for_the_system_is_refused() -> None:
    """A text that was taken for a path is no crash, and is not printed in full."""
    with pytest.raises(UserError, match=r"^x{80}\.\.\.: no such file or folder"):
        find_data("x" * 5000, None)


def test_an_unknown_kind_of_file_is_refused(write: Write) -> None:
    """The kinds that are read are named."""
    message = refusal(write("a.txt", b"a,b\n"))
    assert "unknown kind of file; expected one of .jsonl, .json, .csv, .jsonl.gz," in message


def test_the_hash_is_of_content_and_order(write: Write) -> None:
    """A renamed or moved file is the same data; a changed byte or another order is not."""

    def hashed(*files: tuple[str, bytes]) -> str:
        folder = write(f"{len(list(root.iterdir()))}/README", b"").parent
        for name, data in files:
            (folder / name).write_bytes(data)
        return content_hash(find_data(str(folder), None))

    root = write("README", b"").parent
    first = hashed(("a.jsonl", b'{"a": 1}'), ("b.jsonl", b'{"a": 2}'))
    assert first == hashed(("c.jsonl", b'{"a": 1}'), ("d.jsonl", b'{"a": 2}'))
    assert first != hashed(("a.jsonl", b'{"a": 2}'), ("b.jsonl", b'{"a": 1}'))
    assert first != hashed(("a.jsonl", b'{"a": 1}'), ("b.jsonl", b'{"a": 3}'))
    assert first != hashed(("a.jsonl", b'{"a": 1}{"a": 2}'))


# Streaming


@pytest.mark.parametrize("name", ["a.jsonl", "b.json", "c.csv", "d.jsonl.gz", "e.json.zst", *TABLE_NAMES])
def test_progress_goes_to_the_end(tmp_path: Path, name: str) -> None:
    """In bytes of the stored files, never backwards or beyond, about every thousand rows and after each file."""
    rows = [{"a": f"{i} {i * 7919 % 10007}" * 20} for i in range(10_500)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    text = {"json": json.dumps(rows), "csv": "a\n" + "\n".join(row["a"] for row in rows)}
    folder = tmp_path / "data"
    folder.mkdir()
    if name in TABLE_NAMES:
        write_table(folder / name, rows)
    else:
        _, kind, *packed = name.split(".")
        (folder / name).write_bytes(PACK["".join(f".{p}" for p in packed)](text.get(kind, lines).encode()))
    (folder / "z.jsonl").write_bytes(b"{}\n")
    data = find_data(str(folder), None)
    seen: list[tuple[int, int]] = []
    assert len(list(raw_rows(data, lambda done, total: seen.append((done, total))))) == 10_501
    size = data_size(data)
    assert size == sum(file.stat().st_size for file in folder.iterdir())
    assert {total for _, total in seen} == {size}
    done = [done for done, _ in seen]
    assert done == sorted(done)
    assert done[-2:] == [size - 3, size]
    assert len(done) == 12
    assert done[4] < size


def peak_bytes(path: Path) -> tuple[int, int]:
    """Number of rows, and the most that Python held while they were read."""
    tracemalloc.start()
    try:
        count = sum(bool(parse_row(row.value)) for row in raw_rows(find_data(str(path), None)))
        return count, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def many_rows(kind: str) -> Iterator[bytes]:
    """20 MB of rows, 10 000 of them."""
    filler = b"\xc3\xa9 text " * 250
    yield {"json": b"[\n", "csv": b"a,label\n"}.get(kind, b"")
    row = {"json": b'{"a": "%s", "label": %d}%s\n', "csv": b"%s,%d%s\n"}.get(kind, b'{"a": "%s", "label": %d}%s\n')
    for i in range(10_000):
        yield row % (filler, i, b"," if kind == "json" and i < 9_999 else b"")
    if kind == "json":
        yield b"]"


@pytest.mark.parametrize("name", long_but(["a.json", "a.jsonl.gz"], ["a.jsonl", "a.json", "a.csv", "a.jsonl.gz"]))
def test_a_large_file_is_never_in_memory(tmp_path: Path, name: str) -> None:
    """20 MB are read within 5 MB."""
    path = tmp_path / name
    open_file: Any = partial(gzip.open, compresslevel=1) if name.endswith(".gz") else open
    with open_file(path, "wb") as file:
        assert sum(file.write(part) for part in many_rows(name.split(".")[1])) > 20e6
    count, peak = peak_bytes(path)
    assert count == 10_000
    assert peak < 5e6


def test_a_stored_conversation_set_is_read(test_data: Path) -> None:
    """Every row of every kind of file people publish, and as many as the file's own text says."""
    for file in sorted(test_data.rglob("*.json*")):
        text = file.read_text(encoding="utf-8")
        expected = json.loads(text) if file.suffix == ".json" else [json.loads(li) for li in text.split("\n") if li]
        assert [row for _, row in contents(file)] == expected


def test_data_files_can_be_made_by_hand(write: Write) -> None:
    """Names are only for messages."""
    data = SourceFiles("mine", ("one",), (write("a.jsonl", b"{}"),))
    assert [data.place(row.file, row.line) for row in raw_rows(data)] == ["one:1"]
