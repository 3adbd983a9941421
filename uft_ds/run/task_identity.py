"""What the tasks of a run ask and what grades them, by content: a resume knows a task by more than its name.

The record has every task that the run ever had: one that was left out for a while comes back as itself, or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from uft_ds.errors import UserError
from uft_ds.host.differences import differing
from uft_ds.host.files import write_atomically
from uft_ds.recipe.settings import ScorerSettings, Settings
from uft_ds.record.run_folder import RunFolder
from uft_ds.rollouts.scorers import SourceScorer
from uft_ds.run.tasks import task_rows
from uft_ds.streams.identity import base_identity

Identities = dict[str, Any]
"""By the task's name: its rows and its scorer, as plain JSON values."""


def task_identities(settings: Settings) -> Identities:
    """Of the tasks of a recipe, which `check_tasks` has accepted.

    Raises:
        UserError: a file cannot be read.
    """
    found = {
        task.name: {
            "rows": task_rows(task, f"evaluate.tasks.{number}").identity()["content"],
            "scorer": _of_scorer(task.scorer, f"evaluate.tasks.{number}.score_by"),
        }
        for number, task in enumerate(settings.tasks)
    }
    as_recorded: Identities = json.loads(json.dumps(found))
    return as_recorded


def write_task_identities(folder: RunFolder, found: Identities) -> None:
    """Add to the record, which a run without tasks does not have."""
    if found:
        write_atomically(_path(folder), json.dumps(_recorded(folder) | found, indent=2) + "\n")


def other_contents(folder: RunFolder, found: Identities) -> list[str]:
    """Tasks that ask or are graded by something else than the run's task of their name; a run may know none of them.

    Raises:
        UserError: the record cannot be read.
    """
    then = _recorded(folder)
    others = {name: [key for key, _, _ in differing(then[name], found[name])] for name in then if name in found}
    return [
        f"evaluate.tasks: {name!r} is another task than when the run began ({', '.join(keys)}); give it another name"
        for name, keys in others.items()
        if keys
    ]


def _recorded(folder: RunFolder) -> Identities:
    path = _path(folder)
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or not all(isinstance(one, dict) for one in found.values()):
            raise ValueError("no object of tasks")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error}): bring it back from a copy of the run") from None
    return found


def _of_scorer(scorer: ScorerSettings, key: str) -> Mapping[str, Any]:
    """What grades, without where a server of it is. A reward model is not loaded: it would fill the GPU here."""
    kind, _, target = scorer.by.partition(":")
    if kind == "reward":
        return {"scorer": "reward", "model": base_identity(str(Path(target)), None), "map": scorer.rule}
    made = SourceScorer(scorer, key)
    try:
        found = dict(made.identity())
    finally:
        made.close()
    return found | {"scorer": {name: value for name, value in found["scorer"].items() if name != "url"}}


def _path(folder: RunFolder) -> Path:
    return folder.path / "data" / "tasks.json"
