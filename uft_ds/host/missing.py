"""What is said of a path that is not there: where it was looked for, and what is called alike beside it."""

from __future__ import annotations

import difflib
from pathlib import Path


def has_the_form_of_a_path(name: str) -> bool:
    """Whether a name can be a path alone, and not the name of something on the hub."""
    return name.startswith(("/", ".", "~")) or name.count("/") > 1


def begins_in_a_folder(name: str) -> bool:
    """Whether the first part of a name is a folder here; the name may be of the hub all the same."""
    first, slash, _ = name.partition("/")
    return bool(slash) and Path(first).is_dir()


def no_such_folder(path: str) -> str:
    """That a folder is not there, as the end of a sentence that has named it."""
    near = " or ".join(_near(Path(path)))
    return f"no such folder{where_looked_for(path)}{near and f'; did you mean {near}?'}"


def where_looked_for(path: str) -> str:
    """Where a relative path that is not there was looked for, as a part of a sentence; nothing of an absolute one."""
    return "" if Path(path).is_absolute() else f"; it is looked for in {Path.cwd()}, where the command was started"


def _near(path: Path) -> list[str]:
    """Up to three names of what lies beside the first part of a path that is not there, and is called alike."""
    while path != path.parent and not path.parent.is_dir():
        path = path.parent
    try:
        there = {entry.name.casefold(): str(entry) for entry in sorted(path.parent.iterdir())}
    except OSError:
        return []
    return [there[name] for name in difflib.get_close_matches(path.name.casefold(), there, n=3)]
