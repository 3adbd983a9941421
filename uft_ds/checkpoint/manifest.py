"""The manifest lists a checkpoint's files with their sizes and SHA-256; a checkpoint without a valid one is not used.

Neither `torch.load` nor safetensors detects a flipped bit; the manifest does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from uft_ds.host.files import is_below, read_regular_text, sha256, write_atomically
from uft_ds.host.formats import KEY, UnknownFormat, check_format

MANIFEST = "manifest.json"
FORMAT = 1
"""Version of the checkpoint's layout: which files it has, and what the manifest records of each."""


@dataclass(frozen=True)
class Written:
    """Size and checksum of a file on the disk. sha256: hex digest of the content that was read back."""

    num_bytes: int
    sha256: str


class NamesOutside(ValueError):
    """A manifest names a file outside of its folder, which is never read."""


def write_manifest(folder: Path, files: Mapping[str, Written]) -> None:
    """Record files by their names below `folder`. Written last, so that its existence means a complete checkpoint."""
    entries = {name: {"bytes": w.num_bytes, "sha256": w.sha256} for name, w in sorted(files.items())}
    write_atomically(folder / MANIFEST, json.dumps({KEY: FORMAT, "files": entries}, indent=2) + "\n")


def manifest_problem(folder: Path) -> str | None:
    """A description of the first problem of a folder's files, or None."""
    try:
        recorded = recorded_files(folder)
    except FileNotFoundError:
        return f"{folder / MANIFEST}: missing; the checkpoint was never finished"
    except OSError as error:
        return f"{folder / MANIFEST}: cannot be read ({error.strerror})"
    except NamesOutside as error:
        return f"{folder / MANIFEST}: names {error}, expected only files in the checkpoint's own folder"
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
    except OSError as error:  # the disk fails, or we have no permission to read
        return f"{path}: cannot be read ({error.strerror})"
    return None


def recorded_files(folder: Path) -> dict[str, Written]:
    """The files that a folder's manifest lists, by name.

    Raises:
        OSError: the manifest cannot be read. ValueError: the file is not a manifest. UnknownFormat: other version.
        NamesOutside: it names a file that does not lie in the folder.
    """
    try:
        content = json.loads(read_regular_text(folder / MANIFEST))
        # The first manifests had no version and no other key. In another one, a lost version is a flipped bit in KEY.
        version = None if content.keys() == {"files"} else content[KEY]
        check_format(folder / MANIFEST, version, FORMAT, "start the run anew")
        files = {name: Written(entry["bytes"], entry["sha256"]) for name, entry in content["files"].items()}
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(str(error)) from None
    outside = next((name for name in files if not is_below(name)), None)
    if outside is not None:
        raise NamesOutside(repr(outside))
    return files
