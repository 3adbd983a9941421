"""Rows from files and from the hub, each with the place it came from.

Own readers for json and jsonl: the Arrow reader of `datasets` accepts NaN, turns "0.7" into 0.7, unites
different schemas, and names no line of the file.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uft_ds.errors import UserError

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")


@dataclass(frozen=True)
class Table:
    """The rows of one source, by index. `origins` are made on demand: a hub data set has 10^6 rows."""

    rows: Sequence[Any]
    places: Sequence[str] | None
    label: str

    def __len__(self) -> int:
        return len(self.rows)

    def origin(self, index: int) -> str:
        return self.places[index] if self.places is not None else f"{self.label}:{index + 1}"


def read_table(path: str, split: str | None) -> Table:
    """All rows of a local file, a folder of files, or a hub data set.

    Raises:
        UserError: names the file (and line), what was found and what was expected.
    """
    local = Path(path)
    try:
        is_local = local.exists()
    except OSError as error:
        raise UserError(f"{path[:80]}...: no such file or folder ({error.strerror})") from None
    if is_local:
        files = [local] if local.is_file() else _files_of(local, split)
        located = [row for file in files for row in _read_file(file)]
        if not located:
            raise UserError(f"{path}: no rows; the file is empty")
        return Table([row for _, row in located], [place for place, _ in located], path)
    if local.suffix in {".json", ".jsonl", ".gz", ".parquet"} or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", path):
        raise UserError(f"{path}: no such file or folder")
    return _read_hub(path, split)


def _files_of(folder: Path, split: str | None) -> list[Path]:
    candidates = sorted(file for file in folder.rglob("*") if file.name.endswith(SUFFIXES) and file.is_file())
    files = [file for file in candidates if split is None or file.name.startswith(split)]
    if not files:
        names = ", ".join(file.name for file in candidates[:5]) or "none"
        begins = f" whose name begins with {split!r}" if split else ""
        raise UserError(f"{folder}: no data file ({', '.join(SUFFIXES)}){begins}; data files found: {names}")
    return files


def _read_hub(name: str, split: str | None) -> Table:
    import datasets

    try:
        data = datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # noqa: BLE001 - any failure of the hub is the user's to mend
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{name}: neither a local file or folder, nor could it be had from the hub ({reason}); "
            "give a local path, or check the name, the split and the network"
        ) from None
    return Table(data, None, f"{name}[{split or 'train'}]")


def _read_file(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if file.suffix == ".parquet":
        yield from _read_parquet(file)
        return
    if not file.name.endswith(SUFFIXES):
        raise UserError(f"{file}: unknown kind of file; expected one of {', '.join(SUFFIXES)}")
    try:
        data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file}: cannot be read ({error})") from None
    if file.name.removesuffix(".gz").endswith(".json"):
        yield from _read_json(file, data)
    else:
        yield from _read_jsonl(file, data)


def _read_parquet(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(file).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{file}: not a readable parquet file ({error})") from None
    for number, row in enumerate(rows, start=1):
        yield f"{file}:{number}", row


def _read_jsonl(file: Path, data: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    # Only \n ends a line: str.splitlines would also break at U+2028, which JSON text may hold.
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if line.strip():
            yield f"{file}:{number}", _row(_parse(line, f"{file}:{number}"), f"{file}:{number}")


def _read_json(file: Path, data: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    value = _parse(data.removeprefix(b"\xef\xbb\xbf"), str(file))
    if not isinstance(value, list):
        raise UserError(
            f"{file}: expected a JSON array of rows, found {type(value).__name__}; one object a line is .jsonl"
        )
    for number, row in enumerate(value, start=1):
        yield f"{file}:{number}", _row(row, f"{file}, row {number}")


def _row(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{place}: expected a JSON object, found {type(value).__name__}")
    return value


def _parse(data: bytes, place: str) -> Any:
    try:
        return json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_object_without_duplicates,
            parse_constant=_refuse_constant,
        )
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: byte {error.start} is not UTF-8; convert the file to UTF-8") from None
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if b"\n" in data.strip() else ""
        raise UserError(f"{place}{line}: not valid JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not valid JSON: {error}") from None


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(k for k in keys if keys.count(k) > 1)!r} is given twice")
    return value


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number")
