"""The oldest versions that pyproject.toml allows, one `name==version` a line, as a constraints file for pip.

    python scripts/lowest_versions.py >lowest.txt
    pip install --constraint lowest.txt .

`make test-lowest` installs them and trains with them: a lower bound that nobody has run is a guess.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

PROJECT = Path(__file__).parents[1] / "pyproject.toml"


def lowest_versions(project: str) -> dict[str, str]:
    """The lower bound of each of the package's own dependencies.

    Args:
        project: the text of a pyproject.toml.
    Raises:
        ValueError: a dependency has no lower bound of the form `name>=version`.
    """
    found = {}
    for requirement in tomllib.loads(project)["project"]["dependencies"]:
        match = re.match(r"([A-Za-z0-9._-]+)>=([0-9.]+)(?:,|$)", requirement)
        if match is None:
            raise ValueError(f"pyproject.toml: {requirement!r} has no lower bound; expected name>=version")
        found[match[1]] = match[2]
    return found


def constraints(versions: dict[str, str]) -> str:
    """A line each, but for torch: its builds differ by machine, so the Makefile installs it first."""
    return "".join(f"{name}=={version}\n" for name, version in versions.items() if name != "torch")


if __name__ == "__main__":
    print(constraints(lowest_versions(PROJECT.read_text(encoding="utf-8"))), end="")
