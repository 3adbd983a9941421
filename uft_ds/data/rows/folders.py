"""The data files of a folder: all of them, or an error. A file that is passed over would be missed by nobody."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from uft_ds.errors import UserError

_SPLITS, _STATE = "dataset_dict.json", "state.json"
_DATASETS_OWN = ("dataset_info.json", _STATE, _SPLITS)
"""What `Dataset.save_to_disk` and `DatasetDict.save_to_disk` write beside the rows."""


def data_files(folder: Path, split: str | None, suffixes: tuple[str, ...]) -> tuple[Path, ...]:
    """All data files below a folder in the order of their names, without hidden ones; links to folders are followed.

    Args:
        split: only files whose names begin with it; of a `DatasetDict` that was saved to disk, this split's folder.
    Raises:
        UserError: there is none; a link is dead, a sub-folder or a pipe cannot be read, a name is not UTF-8; or a
            `DatasetDict` has several splits, of which none is asked for.
    """
    if (folder / _SPLITS).is_file():
        folder, split = _folder_of_split(folder, split), None
    found = sorted(_walk(folder, suffixes, split, (os.path.realpath(folder),)))
    if any(file.suffix == ".arrow" for file in found):
        found = [file for file in found if file.name not in _DATASETS_OWN]
    if not found:
        others = sorted(_walk(folder, suffixes, None, (os.path.realpath(folder),))) if split else []
        names = ", ".join(file.name for file in others[:5]) or "none"
        begins = f" whose name begins with {split!r}" if split else ""
        raise UserError(f"{folder}: no data file ({', '.join(suffixes)}){begins}; data files found: {names}")
    for file in found:
        _check_name(folder, file)
    return tuple(found)


def _check_name(folder: Path, file: Path) -> None:
    # Places of rows are written into the run's files, which are UTF-8; Python keeps other bytes as lone surrogates.
    name = file.relative_to(folder).as_posix()
    try:
        name.encode()
    except UnicodeEncodeError:
        shown = ascii(os.fsencode(name))[2:-1]
        raise UserError(f"{folder}: the name of the file {shown} in it is not UTF-8; rename it") from None


def check_is_a_file(path: Path, name: str) -> None:
    """Refuse a dead link, and what cannot be read twice: files are hashed before their rows are read.

    Raises:
        UserError: says what it is.
    """
    if path.is_symlink() and not path.exists():
        raise UserError(f"{name}: a link to {path.readlink()}, which is not there; bring the file back, or remove it")
    if not path.is_file():
        raise UserError(
            f"{name}: a pipe, a device or a socket, expected a file: rows are read more than once; write them to a file"
        )


def _walk(folder: Path, suffixes: tuple[str, ...], split: str | None, above: tuple[str, ...]) -> Iterator[Path]:
    """
    Args:
        above: the real paths of this folder and those that it was reached through.
    """
    try:
        entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
        rows = _rows_of_data_set(folder)
        for entry in entries:
            if entry.is_dir():
                real = os.path.realpath(entry)
                if real in above:
                    raise UserError(f"{entry}: a link to a folder that holds it, so the files below it never end")
                yield from _walk(entry, suffixes, split, (*above, real))
            elif _may_be_data(entry, suffixes) and (split is None or entry.name.startswith(split)):
                check_is_a_file(entry, str(entry))
                if entry.suffix != ".arrow" or rows is None or entry.name in rows:
                    yield entry
    except OSError as error:
        raise UserError(f"{error.filename or folder}: cannot be read ({error.strerror})") from None


def _may_be_data(entry: Path, suffixes: tuple[str, ...]) -> bool:
    # A dead link without a suffix may have been a folder of data.
    return entry.name.endswith(suffixes) or (entry.is_symlink() and not entry.suffix and not entry.exists())


def _rows_of_data_set(folder: Path) -> set[str] | None:
    """The files of a `Dataset` that was saved into this folder; None if there is none.

    `Dataset.map` and others leave files `cache-*.arrow` of other rows beside them.
    """
    state = _read_json(folder / _STATE)
    listed = state.get("_data_files") if isinstance(state, dict) else None
    if not isinstance(listed, list):
        return None
    names = {file["filename"] for file in listed if isinstance(file, dict) and isinstance(file.get("filename"), str)}
    lacking = sorted(name for name in names if not (folder / name).is_file())
    if lacking:
        raise UserError(f"{folder / lacking[0]}: is not there, but {folder / _STATE} lists it; is the copy complete?")
    return names


def _folder_of_split(folder: Path, split: str | None) -> Path:
    stored = _read_json(folder / _SPLITS)
    splits = stored.get("splits") if isinstance(stored, dict) else None
    if not isinstance(splits, list) or not splits or not all(isinstance(name, str) for name in splits):
        raise UserError(f"{folder / _SPLITS}: expected {{'splits': [names]}}, as DatasetDict.save_to_disk writes it")
    if split is None and len(splits) == 1:
        split = splits[0]
    if split is None or split not in splits:
        asked = "give one as `split`" if split is None else f"`split` asks for {split!r}"
        raise UserError(f"{folder}: holds the splits {', '.join(splits)}; {asked}")
    if not (folder / split).is_dir():
        raise UserError(f"{folder / split}: is not there, but {folder / _SPLITS} lists it; is the copy complete?")
    return folder / split


def _read_json(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (ValueError, RecursionError):
        return None
