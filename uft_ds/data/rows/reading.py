"""Read rows from files and from the hub, one by one, each with the place it came from.

We have our own readers for json, jsonl and csv, because the readers of `datasets` accept NaN, turn "0.7" into 0.7,
unite different schemas, make dates of text, and do not name a line of the file. Only a few rows are in memory at once.

A fault of one row is a ValueError of `parse_row`, so that the caller may leave the row out. A fault that makes the
rest of the file doubtful is a UserError of `raw_rows`.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import io
import os
import re
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uft_ds.data.rows.arrow_rows import BATCH_ROWS, arrow_rows, parquet_rows, plain_rows
from uft_ds.data.rows.csv_rows import BadRow, csv_rows
from uft_ds.data.rows.folders import check_is_a_file, data_files
from uft_ds.data.rows.json_rows import json_array, json_lines, parse_object
from uft_ds.data.rows.places import place_of
from uft_ds.errors import UserError
from uft_ds.host.files import sha256
from uft_ds.host.hub import no_network_hint
from uft_ds.host.missing import where_looked_for
from uft_ds.host.remembered_hashes import remembered_sha256

if TYPE_CHECKING:
    import datasets

TEXT_READERS: dict[str, Callable[[Any, str], Iterator[tuple[int, int, Any]]]] = {
    ".jsonl": json_lines,
    ".json": json_array,
    ".csv": csv_rows,
}
TABLE_READERS = {".parquet": parquet_rows, ".arrow": arrow_rows}
COMPRESSIONS = (".gz", ".zst")
SUFFIXES = (*(kind + packed for packed in ("", *COMPRESSIONS) for kind in TEXT_READERS), *TABLE_READERS)

_BUFFER_BYTES = 256 * 1024

Value = bytes | dict[str, Any] | BadRow


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row before it is parsed.

    file: index of the file in the source's names.
    line: the line on which the row starts, counted from 1; the row's number in a format without lines; a negative
        number of `places` in a JSON array with several rows on a line.
    byte: offset of the row's first byte in the uncompressed file; None in a format without lines.
    value: the row's JSON text, or its values.
    """

    file: int
    line: int
    byte: int | None
    value: Value


@dataclass(frozen=True)
class SourceFiles:
    """The files of one source, or a data set of the hub.

    label: path[split], as the user gave it.
    names: the name of each file in messages: the path as the user gave it, then the file's name in that folder.
    paths: the paths of these files; empty for the hub.
    """

    label: str
    names: tuple[str, ...]
    paths: tuple[Path, ...] = ()
    hub: datasets.Dataset | None = None

    def place(self, file: int, line: int) -> str:
        """`file:line`, `file[index]` in an array with several rows on a line, or `name[split]:row` for the hub."""
        return place_of(self.names[file], line)


def find_data(path: str, split: str | None, key: str = "") -> SourceFiles:
    """Find a local file, a folder of files, or a data set of the hub; no rows are read yet.

    Args:
        key: the recipe's key of the path, such as data.sources.0.path, with which a refusal begins; empty for a path
            of the command line.
    Raises:
        UserError: names what was looked for, what was found and what was expected.
    """
    try:
        data = _found(path, split)
        for name, file in _stored_files(data):
            with _readable(name), file.open("rb"):
                pass
    except UserError as error:
        raise UserError(f"{key}: {error}" if key else str(error)) from None
    return data


def _found(path: str, split: str | None) -> SourceFiles:
    if not path.strip():
        raise UserError("a source's path is empty; expected a file, a folder (`.` is this one) or a hub name")
    local = Path(path)
    label = f"{path}[{split}]" if split else path
    try:
        if local.is_dir():
            files = data_files(local, split, SUFFIXES)
            names = tuple(f"{path.rstrip('/')}/{file.relative_to(local).as_posix()}" for file in files)
            return SourceFiles(label, names, files)
        is_local = local.exists() or local.is_symlink()
    except OSError as error:
        shown = path if len(path) <= 80 else f"{path[:80]}..."
        raise UserError(f"{shown}: no such file or folder ({error.strerror})") from None
    if is_local:
        check_is_a_file(local, path)
        if not path.endswith(SUFFIXES):
            raise UserError(f"{path}: unknown kind of file; expected one of {', '.join(SUFFIXES)}")
        return SourceFiles(label, (path,), (local,))
    if path.endswith((*SUFFIXES, *COMPRESSIONS)) or not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)+", path):
        raise UserError(f"{path}: no such file or folder{where_looked_for(path)}")
    label = f"{path}[{split or 'train'}]"
    return SourceFiles(label, (label,), hub=_load_from_hub(path, split))


def _load_from_hub(path: str, split: str | None) -> datasets.Dataset:
    """Load a data set by owner/name, or one folder of its repository by owner/name/folder."""
    import datasets

    owner, repository, *folders = path.split("/")
    name, folder = f"{owner}/{repository}", "/".join(folders) or None
    try:
        return datasets.load_dataset(name, data_dir=folder, split=split or "train")
    except Exception as error:  # noqa: BLE001 - any failure of the hub is shown to the user
        if isinstance(error, datasets.exceptions.DatasetGenerationError):
            raise UserError(
                f"{path}: loaded from the hub, but `datasets` cannot read its rows ({_innermost(error)}); fetch its "
                "files and give their local path: they are read here one row at a time"
            ) from None
        raise UserError(
            f"{path}: neither a local file or folder, nor could it be loaded from the hub ({_innermost(error)}); "
            f"give a local path, or check the name, the split and the network{no_network_hint()}"
        ) from None


def _innermost(error: BaseException) -> str:
    """The first line of what an error was caused by: `datasets` wraps it in a sentence that says nothing."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


_REMEMBERED_FROM_BYTES = 64 * 2**20
"""A smaller file is hashed at every start, which takes less than a tenth of a second."""


def content_hash(data: SourceFiles) -> str:
    """A hash that is equal only for the same rows in the same order; moved or renamed files keep it.

    The suffixes are part of the hash, because they decide how rows are read.
    """
    digest = hashlib.sha256()
    for name, path in _stored_files(data):
        with _readable(name):
            suffix = next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")
            of_file = (
                remembered_sha256(path.resolve()) if path.stat().st_size >= _REMEMBERED_FROM_BYTES else sha256(path)
            )
            digest.update(f"{suffix} {of_file} ".encode())
    if data.hub is not None:
        # `train[:10%]` has the same stored files as `train`, so the split's name must be hashed too.
        digest.update(str(data.hub.split if data.hub.cache_files else data.hub._fingerprint).encode())
    return digest.hexdigest()


def data_size(data: SourceFiles) -> int:
    """The size of all files in bytes, as stored (compressed files count compressed)."""
    return sum(_sizes(data))


def _sizes(data: SourceFiles) -> list[int]:
    sizes = []
    for name, path in _stored_files(data):
        with _readable(name):
            sizes.append(path.stat().st_size)
    if data.hub is not None:
        return [sum(sizes) or data.hub.data.nbytes]
    return sizes


def _stored_files(data: SourceFiles) -> list[tuple[str, Path]]:
    if data.hub is None:
        return list(zip(data.names, data.paths, strict=True))
    return [(data.label, Path(file["filename"])) for file in data.hub.cache_files]


def raw_rows(
    data: SourceFiles, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> Generator[RawRow, None, None]:
    """All rows in order, streamed.

    Args:
        on_progress: called about every 1,000 rows and after each file with (bytes read, all bytes) of the stored
            files.

    Raises:
        UserError: a file cannot be read to its end, or there are no rows at all. Rows before the fault have already
            been yielded.
    """
    sizes = _sizes(data)
    total, before, count = sum(sizes), 0, 0
    for file, size in enumerate(sizes):
        for done, line, byte, value in _rows_of(data, file, size):
            yield RawRow(file, line, byte, value)
            count += 1
            if count % BATCH_ROWS == 0:
                on_progress(before + min(int(done), size), total)
        before += size
        on_progress(before, total)
    if not count:
        raise UserError(f"{data.label}: no rows; the file is empty")


def parse_row(value: Value) -> dict[str, Any]:
    """The values of one row. It depends on its argument alone and may run in any process.

    Raises:
        ValueError: says why this row cannot be used.
    """
    if isinstance(value, bytes):
        return parse_object(value)
    if isinstance(value, BadRow):
        raise ValueError(value.reason)
    return value


LocatedRow = tuple[float, int, int | None, Value]
"""(bytes of the stored file read so far, line, byte, value)"""


def _rows_of(data: SourceFiles, file: int, size: int) -> Iterator[LocatedRow]:
    if data.hub is not None:
        return _table_rows(_hub_rows(data.hub), size)
    path, name = data.paths[file], data.names[file]
    if path.suffix in TABLE_READERS:
        return _table_rows(TABLE_READERS[path.suffix](path, name), size)
    return _text_rows(path, name)


def _table_rows(batches: Iterator[tuple[float, list[dict[str, Any]]]], size: int) -> Iterator[LocatedRow]:
    number = 0
    for share, rows in batches:
        for row in rows:
            number += 1
            yield share * size, number, None, row


def _hub_rows(hub: datasets.Dataset) -> Iterator[tuple[float, list[dict[str, Any]]]]:
    # As tables, not as `datasets` decodes them: pictures would need further packages, and a null is not told from text.
    done = 0
    for table in hub.with_format("arrow").iter(batch_size=BATCH_ROWS):
        done += table.num_rows
        yield done / len(hub), plain_rows(table)


def _text_rows(path: Path, name: str) -> Iterator[LocatedRow]:
    packed = path.suffix if path.suffix in COMPRESSIONS else ""
    read = TEXT_READERS[Path(path.name.removesuffix(packed)).suffix]
    line = 0
    with (
        _readable(name, lambda: f" after line {line}" if line else ""),
        path.open("rb", buffering=0) as stored,
        _unpacked(stored, packed) as stream,
    ):
        _refuse_other_content(stream.peek(4)[:4], name)
        rows = read(stream, name)
        for first in rows:
            done = stored.tell()  # the position in the stored file, compressed or not; asked once per batch
            for line, byte, value in chain([first], islice(rows, BATCH_ROWS - 1)):
                yield done, line, byte, value


_MAGIC = {
    b"\x1f\x8b": "packed by gzip: give its name the ending .gz",
    b"\x28\xb5\x2f\xfd": "packed by zstd: give its name the ending .zst",
    b"PK\x03\x04": "a zip archive (or an Excel file): unpack it, or save it as csv",
    b"PAR1": "parquet: give its name the ending .parquet",
    b"BZh": "packed by bzip2: unpack it",
    b"\xfd7zX": "packed by xz: unpack it",
}
"""What a file begins with that is no text, and what to do."""


def _refuse_other_content(start: bytes, name: str) -> None:
    for magic, found in _MAGIC.items():
        if start.startswith(magic):
            raise UserError(f"{name}: no text, but {found}")
    if start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) or b"\0" in start[:2]:
        raise UserError(f"{name}:1: this is UTF-16; convert the file to UTF-8 (iconv -f UTF-16 -t UTF-8)")


def _unpacked(stored: io.FileIO, packed: str) -> io.BufferedReader:
    raw: Any = stored
    if packed and not os.fstat(stored.fileno()).st_size:
        raise OSError("the archive is empty")
    if packed == ".gz":
        raw = gzip.GzipFile(fileobj=stored, mode="rb")
    elif packed == ".zst":
        import pyarrow as pa

        raw = pa.CompressedInputStream(pa.PythonFile(stored, mode="r"), "zstd")
    return io.BufferedReader(raw, _BUFFER_BYTES)


@contextmanager
def _readable(name: str, where: Callable[[], str] = lambda: "") -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        of_system = error.strerror if isinstance(error, OSError) else None
        hint = "" if of_system else "; is the copy complete?"
        raise UserError(f"{name}: cannot be read{where()} ({of_system or error}){hint}") from None
