"""Whose a checkpoint is: hashes of its run's recipe and inputs, which equal runs share and other runs do not.

A run records them when it begins; each of its checkpoints holds a copy in trainer.json.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from uft_ds.record.run_folder import RunFolder, reading_identity

RUN = "run"
"""The key of the owner in the run's identity.json and in a checkpoint's trainer.json."""


@dataclass(frozen=True)
class Owner:
    """SHA-256, hex: of the recipe's keys that decide what a run is, and of its inputs' content (`run_identity`).

    Paths are no part of it, so copies of a run, and runs that would be bit for bit the same, are one owner.
    """

    recipe: str
    identity: str


def parsed_owner(value: Any) -> Owner | None:
    """The owner in a file's key `run`; None where there is none, as in files of older versions.

    Raises:
        ValueError: it is something else.
    """
    if value is None:
        return None
    if not isinstance(value, dict) or not all(isinstance(value.get(key), str) for key in ("recipe", "identity")):
        raise ValueError(f"{RUN}: expected the hashes recipe and identity, found {value!r}")
    return Owner(value["recipe"], value["identity"])


def owner_of(folder: RunFolder) -> Owner | None:
    """The owner that a run recorded when it began; None for a run of an older version, and where there is no record.

    Raises:
        UserError: identity.json cannot be read.
    """
    if not folder.identity.exists():
        return None
    with reading_identity(folder) as identity:
        return parsed_owner(identity.get(RUN))
