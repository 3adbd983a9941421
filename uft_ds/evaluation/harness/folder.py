"""The folder of one evaluation: begun with some settings, continued with the same ones, and never with others.

evaluation.json      model and settings, written before the first request
answers/             what has been answered so far
results.json, items/ as in `evaluation/results.py`, once it has ended
samples/TASK.jsonl   questions with their answers, to look at
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from uft_ds.errors import UserError
from uft_ds.evaluation.harness.found import SAMPLES
from uft_ds.evaluation.results import ITEMS, RESULTS, Evaluation, read_evaluation
from uft_ds.host.differences import differences
from uft_ds.host.files import read_regular_text, write_atomically

BEGUN = "evaluation.json"
ANSWERS = "answers"


@dataclass(frozen=True)
class Begun:
    """An evaluation's model and settings: all that its numbers depend on.

    origin: where the model came from. It is recorded with the results and never compared: a model may move.
    """

    model: Mapping[str, Any]
    settings: Mapping[str, Any]
    origin: Mapping[str, Any] = field(default_factory=dict)

    def tree(self) -> dict[str, Any]:
        """What is compared, as JSON has it."""
        found: dict[str, Any] = json.loads(json.dumps({"model": dict(self.model), "settings": dict(self.settings)}))
        return found

    def answers(self, folder: Path) -> Path:
        """Where the answers of exactly this evaluation are kept, so that no rank meets those of another one."""
        text = json.dumps(self.tree(), sort_keys=True)
        return folder / ANSWERS / hashlib.sha256(text.encode()).hexdigest()[:16]


def has_ended(folder: Path, begun: Begun) -> bool:
    """Whether exactly this evaluation has ended in the folder."""
    path = folder / BEGUN
    return path.exists() and (folder / RESULTS).exists() and _read(path) == begun.tree()


def begin(folder: Path, begun: Begun, *, overwrite: bool) -> Evaluation | None:
    """Begin an evaluation in a folder, or continue the one that is there.

    Args:
        overwrite: whether an evaluation with another model or other settings may be deleted.
    Returns:
        the evaluation, if it has ended; None if there is something to do.
    Raises:
        UserError: the folder holds something else, or an evaluation with another model or other settings.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: {folder}: cannot be written ({error.strerror or error})") from None
    path = folder / BEGUN
    if path.exists():
        there = _read(path)
        different = differences(there, begun.tree())
        if not different:
            return read_evaluation(folder) if (folder / RESULTS).exists() else None
        if not overwrite:
            raise UserError(
                f"{folder}: holds an evaluation with another {different[0]}; give another folder with --out, or "
                "--overwrite to delete that one"
            )
        _clear(folder, keeping=begun.answers(folder))
    elif any(path.name != ANSWERS for path in folder.iterdir()):  # another rank may have begun
        raise UserError(f"{folder}: is not empty, and no evaluation by `uft eval`; give another folder with --out")
    write_atomically(path, json.dumps(begun.tree(), indent=2, ensure_ascii=False) + "\n")
    return None


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_regular_text(path))
        if not isinstance(found, dict):
            raise ValueError("no object")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not the beginning of an evaluation ({error}); delete its folder") from None
    return found


def _clear(folder: Path, *, keeping: Path) -> None:
    """Delete an evaluation, its results first: a folder that lost part of its items must not look whole.

    Args:
        keeping: answers that other ranks may have begun to write.
    """
    for name in (RESULTS, BEGUN):
        (folder / name).unlink(missing_ok=True)
    others = [path for path in (folder / ANSWERS).glob("*") if path != keeping]
    for path in (folder / ITEMS, folder / SAMPLES, *others):
        shutil.rmtree(path, ignore_errors=True)
