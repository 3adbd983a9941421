"""Versions of the files that another version of uft_ds may read: one message where it cannot.

A file's version is an integer that rises when older code would misread the file, not when something is added.
"""

from __future__ import annotations

from pathlib import Path

from uft_ds.errors import UserError

KEY = "format"
"""The version's key in a JSON file."""


class UnknownFormat(UserError):
    """A file of a version that this code does not read."""


def check_format(path: Path | str, found: object, known: int, remedy: str) -> None:
    """Refuse a file of another version than `known`.

    Args:
        found: what the file says; None, where it says nothing, is version 1: the first files had no number.
        remedy: what to do besides updating uft_ds.
    Raises:
        UnknownFormat: it is another version, or no version at all.
    """
    version = 1 if found is None else found
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise UnknownFormat(f"{path}: its format is {version!r}, expected a whole number; {remedy}")
    if version != known:
        newer = "written by a newer uft_ds: update it" if version > known else "written by an older uft_ds"
        raise UnknownFormat(f"{path}: format {version} found, this uft_ds reads format {known}: {newer}, or {remedy}")
