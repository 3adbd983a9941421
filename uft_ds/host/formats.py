"""Format versions of files that other versions of uft_ds may read.

A file's version is an integer. It is raised when older code would misread the file, not when something is added.
"""

from __future__ import annotations

from pathlib import Path

from uft_ds.errors import UserError

KEY = "format"
"""The key of the version in a JSON file."""


class UnknownFormat(UserError):
    """The file has a format version that this code does not read."""


def check_format(path: Path | str, found: object, known: int, remedy: str) -> None:
    """Refuse a file whose format version is not `known`.

    Args:
        found: the version in the file; None means version 1, because the first files had no version.
        remedy: what the user can do instead of updating uft_ds.
    Raises:
        UnknownFormat: the version is another one, or is not a whole number.
    """
    version = 1 if found is None else found
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise UnknownFormat(f"{path}: its format is {version!r}, expected a whole number; {remedy}")
    if version != known:
        newer = "written by a newer uft_ds: update it" if version > known else "written by an older uft_ds"
        raise UnknownFormat(f"{path}: format {version} found, this uft_ds reads format {known}: {newer}, or {remedy}")
