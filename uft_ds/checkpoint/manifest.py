"""The list of a checkpoint's files with their sizes and SHA-256: a checkpoint counts only with a valid one.

A flipped bit passes both `torch.load` and safetensors without a word; the manifest is what finds it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from uft_ds.host.files import sha256, write_atomically
from uft_ds.host.formats import KEY, UnknownFormat, check_format

MANIFEST = "manifest.json"
FORMAT = 1
"""Of the whole checkpoint: which files there are, and what the manifest says of them."""


@dataclass(frozen=True)
class Written:
    """A file as it is on the disk. sha256: hex digest of what was read back."""

    num_bytes: int
    sha256: str


def write_manifest(folder: Path, files: Mapping[str, Written]) -> None:
    """Record files by their names below `folder`; the last thing that is written there."""
    entries = {name: {"bytes": w.num_bytes, "sha256": w.sha256} for name, w in sorted(files.items())}
    write_atomically(folder / MANIFEST, json.dumps({KEY: FORMAT, "files": entries}, indent=2) + "\n")


def manifest_problem(folder: Path) -> str | None:
    """What is wrong with a folder's files, or None."""
    try:
        recorded = recorded_files(folder)
    except FileNotFoundError:
        return f"{folder / MANIFEST}: missing; the checkpoint was never finished"
    except OSError as error:
        return f"{folder / MANIFEST}: cannot be read ({error.strerror})"
    except ValueError:
        return f"{folder / MANIFEST}: not a manifest"
    except UnknownFormat as error:
        return str(error)
    problems = (_file_problem(folder / name, written) for name, written in recorded.items())
    return next((problem for problem in problems if problem is not None), None)


def _file_problem(path: Path, written: Written) -> str | None:
    try:
        if not path.is_file():
            return f"{path}: missing"
        if path.stat().st_size != written.num_bytes:
            return f"{path}: {path.stat().st_size} bytes, {written.num_bytes} recorded"
        if sha256(path) != written.sha256:
            return f"{path}: its content is not what was written"
    except OSError as error:  # a disk that fails, or not ours to read
        return f"{path}: cannot be read ({error.strerror})"
    return None


def recorded_files(folder: Path) -> dict[str, Written]:
    """What a manifest lists.

    Raises:
        OSError: there is none. ValueError: it is no manifest. UnknownFormat: it is of another version.
    """
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        check_format(folder / MANIFEST, content[KEY], FORMAT, "start the run anew")
        files = content["files"]
        return {name: Written(entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(str(error)) from None
