"""Resume a run: choose the checkpoint, and check that recipe, base, tokenizer and data are still the same.

The folder is changed only after every check has passed; then everything written after the checkpoint is removed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from types import MappingProxyType
from typing import Any

from uft_ds.checkpoint.folder import checkpoints_of, newest_whole, point_latest, set_aside, set_aside_of, step_of
from uft_ds.checkpoint.owner import RUN
from uft_ds.checkpoint.state import Position, read_position
from uft_ds.data.sources import PreparedData
from uft_ds.data.store.building import with_later_rules
from uft_ds.data.store.store_files import check_content
from uft_ds.data.store.tokenized import is_whole
from uft_ds.errors import UserError
from uft_ds.host.callbacks import OnProgress, Say
from uft_ds.host.differences import differing
from uft_ds.host.files import write_atomically
from uft_ds.host.locks import Lock
from uft_ds.recipe.file import leaves_of, read_stored_recipe, said, stored_recipe
from uft_ds.recipe.settings import Settings
from uft_ds.record.lines_of_steps import cut_after
from uft_ds.record.metrics_file import damaged_metrics
from uft_ds.record.run_folder import RunFolder, check_own_files, claim_again, reading_identity
from uft_ds.record.samples import Sample
from uft_ds.record.task_answers import TaskAnswer
from uft_ds.run.growth import may_grow, with_other_steps
from uft_ds.run.identity import environment, may_change, run_identity
from uft_ds.run.prepare import check_run, open_data, prepare_run, read_report
from uft_ds.run.start_adapter import read_start
from uft_ds.run.task_identity import Identities, other_contents, task_identities, write_task_identities


def prepare_resume(
    settings: Settings, *, say: Say, on_progress: OnProgress = lambda label, done, total: None
) -> tuple[RunFolder, PreparedData, Lock]:
    """Choose the checkpoint to resume from, and check that recipe, base, tokenizer and data are the same.

    A run without any checkpoint starts at step 0.

    Returns:
        The folder, the data, and the folder's lock.
    Raises:
        UserError: the run is another one, or all its checkpoints are damaged; nothing has been changed.
    """
    folder = RunFolder(settings.output)
    if not folder.lock.exists():
        say(f"{folder.path} holds no run: starting at step 0")
        return prepare_run(settings, overwrite=False, on_progress=on_progress)
    lock = claim_again(folder)
    try:
        found = check_resume(folder, settings, on_progress)
        if found is None:
            say(f"{folder.path} holds no checkpoint: starting at step 0")
            return prepare_run(settings, overwrite=True, on_progress=on_progress, lock=lock)
        for text in found.notes:
            say(text)
        _go_back_to(found.checkpoint, folder, found.settings, found.position)
        grown = {key: values for key, values in found.changes.items() if may_grow(key)}
        write_task_identities(folder, found.tasks)
        _record_resume(folder, found.environment, found.position.state.step, grown)
    except BaseException:
        lock.close()
        raise
    at_start = "" if found.position.state.step else ", the start: no step had been saved"
    say(f"resuming from {found.checkpoint.name}{at_start}")
    return folder, found.data, lock


@dataclass(frozen=True)
class Resumption:
    """A resume for which every check has passed.

    settings: completed, as `check_run` returns them. position: at which the run goes on. notes: for the user, such as
    warnings. environment: that of this process. changes: (value then, value now) of each key of the recipe. tasks: what
    they ask and what grades them.
    """

    checkpoint: Path
    position: Position
    settings: Settings
    data: PreparedData
    notes: tuple[str, ...]
    environment: dict[str, Any]
    changes: dict[str, tuple[Any, Any]]
    tasks: Identities


def check_resume(
    folder: RunFolder, settings: Settings, on_progress: OnProgress = lambda label, done, total: None
) -> Resumption | None:
    """All checks of a resume; nothing is changed. None: the run has no checkpoint, and starts at step 0.

    Raises:
        UserError: the run is another one, all its checkpoints are damaged, or results would be lost.
    """
    check_own_files(folder)
    checkpoint, problems = newest_whole(folder.path)
    problems += [f"{path.name}: damaged, and set aside before" for path in set_aside_of(folder.path)]
    if checkpoint is None and problems:
        raise UserError("\n".join([f"{folder.path}: none of the run's checkpoints can be used", *problems]))
    if checkpoint is None:
        _check_nothing_is_lost(folder, settings)
        return None
    position = resumed_position(folder, checkpoint)
    _check_same_recipe(folder, settings)
    changes = recipe_changes(folder, settings)
    settings, data = check_run(settings, on_progress)
    _check_same_content(folder, run_identity(settings, data, on_progress))
    tasks = task_identities(settings)
    _check_same_tasks(folder, tasks)
    data = _as_tokenized_then(settings, folder, data)
    if settings.start_adapter is not None:
        read_start(folder)
    position, on_steps = with_other_steps(settings, data, position, changes)
    now = environment(settings)
    warnings = (
        *(f"{problem}; {checkpoint.name} is used" for problem in problems),
        *_other_versions(folder, now, position.state.step),
        *_lost_metrics(folder, position.metrics_bytes),
    )
    notes = (*(f"warning: {warning}" for warning in warnings), *on_steps)
    return Resumption(checkpoint, position, settings, data, notes, now, changes, tasks)


_ENDS_EARLY = "generator.max_kl"
"""The key that may have ended a run before its last step; with another value it goes on."""


def nothing_to_do(settings: Settings) -> RunFolder | None:
    """The run that these settings would resume, if it is done and its last checkpoint is intact; otherwise None.

    Raises:
        UserError: the folder holds a run of another recipe.
    """
    folder = RunFolder(settings.output)
    if not folder.done.exists():
        return None
    _check_same_recipe(folder, settings)
    if any(may_grow(key) or key == _ENDS_EARLY for key in recipe_changes(folder, settings)):
        return None
    checkpoint, problems = newest_whole(folder.path)
    return None if checkpoint is None or problems else folder


def resumed_from(folder: RunFolder) -> Path | None:
    """The checkpoint that `prepare_resume` chose; None for a run that starts at step 0.

    Raises:
        UserError: the record of it cannot be read.
    """
    if not folder.resumed.exists():
        return None
    try:
        return folder.checkpoints / _read_resumed(folder)[0]
    except _UNREADABLE as error:
        raise UserError(
            f"{folder.resumed}: cannot be read ({type(error).__name__}: {error}); resume the run again"
        ) from None


def resumed_position(folder: RunFolder, checkpoint: Path) -> Position:
    """The position of a checkpoint, with the state of the source of steps that a resume from it has recorded, if any.

    The first resume after a growth may have to change that state; only later checkpoints hold the changed one.

    Raises:
        UserError: the checkpoint's trainer.json cannot be read.
    """
    position = read_position(checkpoint)
    try:
        name, source = _read_resumed(folder)
    except _UNREADABLE:  # there was no resume, or its record is written again
        return position
    if name != checkpoint.name or source is None:
        return position
    return replace(position, state=replace(position.state, source=source))


_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)


def _read_resumed(folder: RunFolder) -> tuple[str, dict[str, Any] | None]:
    """The name of the checkpoint that the last resume chose, and the state of the source if there is one."""
    content = json.loads(folder.resumed.read_text(encoding="utf-8"))
    source = content.get("source")
    return str(content["checkpoint"]), None if source is None else dict(source)


def _check_nothing_is_lost(folder: RunFolder, settings: Settings) -> None:
    """Refuse to start at step 0 in a folder whose results would be lost.

    Raises:
        UserError: its run is done, or has trained with another recipe.
    """
    if folder.done.exists():
        raise UserError(
            f"{folder.path}: the run is done, and its checkpoints are gone: there is nothing to resume; "
            "--overwrite trains it again"
        )
    if folder.metrics.exists() and folder.metrics.stat().st_size and folder.recipe.exists():
        _check_same_recipe(folder, settings)


def _check_same_recipe(folder: RunFolder, settings: Settings) -> None:
    changes = recipe_changes(folder, settings)
    changed = [
        f"{key}: {said(now)} now, {said(then)} when the run began"
        for key, (then, now) in changes.items()
        if not (may_change(key) or may_grow(key))
    ]
    for key, (then, now) in changes.items():
        # `located` makes only existing paths absolute, so a relative path here means that it no longer exists.
        if isinstance(then, str) and now is not None and then.endswith(f"/{now}"):
            raise UserError(f"{key}: {now}: no such file or folder here; the run began with {then}")
    changed += _other_tasks(folder, settings)
    if changed:
        raise UserError(
            f"{folder.path}: --resume needs the same recipe; give output=PATH for another run, or --overwrite\n"
            + "\n".join(changed)
        )


def _other_tasks(folder: RunFolder, settings: Settings) -> list[str]:
    """Tasks that have the name of another one: their scores would be one curve, and `train.keep_best` compare them."""
    trees = (read_stored_recipe(folder.recipe), settings.stored)
    then, now = ({task["name"]: task for task in tree.get("evaluate", {}).get("tasks", [])} for tree in trees)
    return [
        f"evaluate.tasks: {name!r} is another task than when the run began; give it another name"
        for name in now
        if name in then and _what_is_graded(now[name]) != _what_is_graded(then[name])
    ]


def _check_same_tasks(folder: RunFolder, found: Identities) -> None:
    """Refuse a file of prompts or a scorer that has changed under a task's name."""
    if others := other_contents(folder, found):
        raise UserError("\n".join([f"{folder.path}: --resume needs the same tasks under their names", *others]))


def _what_is_graded(task: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves of a task without where things lie and how they are asked, which `may_change` knows of a source.

    What lies there is compared by `other_contents`.
    """
    leaves = leaves_of(task)
    return {key: leaves[key] for key in leaves if key != "path" and not may_change(f"data.sources.0.{key}")}


ABSENT = "(absent)"
"""Placeholder value of a key that one of two recipes lacks."""


def recipe_changes(folder: RunFolder, settings: Settings) -> dict[str, tuple[Any, Any]]:
    """(value then, value now) of each key that has changed since the folder's run was prepared.

    A `model.revision` that is a tag or a branch is not compared: the run's recipe holds the commit that it was then.
    """
    then, now = leaves_of(read_stored_recipe(folder.recipe)), leaves_of(settings.stored)
    if not re.fullmatch("[0-9a-f]{40}", now["model.revision"] or ""):
        # Preparing a run replaced the user's tag or branch, or none, by its commit. A resume compares the content.
        then["model.revision"] = now["model.revision"]
    both = {key: (then.get(key, ABSENT), now.get(key, ABSENT)) for key in dict.fromkeys((*now, *then))}
    return {key: (before, after) for key, (before, after) in both.items() if before != after}


def _check_same_content(folder: RunFolder, now: dict[str, Any]) -> None:
    """Compare content hashes, so that moved files are accepted and changed files are refused."""
    with reading_identity(folder) as before:
        before.pop(RUN, None)  # of the whole recipe, which is compared key by key
        for source in before["data"].values():
            source["rules"] = with_later_rules(source["rules"])
    differences = _differences(before, now)
    if differences:
        raise UserError(
            f"{folder.path}: the run cannot be resumed: something it depends on has changed since it began\n"
            + "\n".join(f"{key}: {found} now, {expected} then" for key, expected, found in differences)
        )


def _other_versions(folder: RunFolder, now: dict[str, Any], step: int) -> Iterator[str]:
    """Warnings about versions or an attention other than at the run's start, or at resumes that made earlier steps."""
    try:
        start = json.loads(folder.environment.read_text(encoding="utf-8"))
        stages = [("began", start), *((f"was resumed at step {r['step']}", r) for r in start.get("resumes", []))]
        changes = [
            (what, _differences(known := _deciding(then), {key: _deciding(now).get(key) for key in known}))
            for what, then in stages
            if then.get("step", -1) < step  # the steps of a later resume are removed now
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        yield f"{folder.environment} cannot be read: whether versions have changed since the start is not known"
        return
    for what, changed in changes:
        if changed:
            versions = ", ".join(f"{name} {found} now, {before} then" for name, before, found in changed)
            yield f"the run {what} with other versions, so it is not resumed bit for bit: {versions}"


def _deciding(environment: dict[str, Any]) -> dict[str, Any]:
    """What rounds differently elsewhere, by name. Runs of older versions recorded less, which is not compared."""
    attention = {"attention": environment["attention"]} if "attention" in environment else {}
    return {**environment["packages"], **attention}


def _record_resume(
    folder: RunFolder, now: dict[str, Any], step: int, grown: Mapping[str, tuple[Any, Any]] = MappingProxyType({})
) -> None:
    """Append this environment to `resumes` of environment.json; the environment of the start stays unchanged.

    Args:
        grown: (value then, value now) of each key that decides the number of steps and has changed.

    Raises:
        UserError: the folder cannot be written.
    """
    entry = {
        "step": step,
        **now,
        **({"changed": {key: list(values) for key, values in grown.items()}} if grown else {}),
    }
    try:
        stored = json.loads(folder.environment.read_text(encoding="utf-8"))
        stored["resumes"] = [*stored.get("resumes", []), entry]
    except (OSError, ValueError, TypeError, AttributeError):
        stored = {"resumes": [entry]}  # the file was unreadable: the start's environment is lost
    try:
        write_atomically(folder.environment, json.dumps(stored, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"output: {folder.path} cannot be written ({error.strerror or error})") from None


def _lost_metrics(folder: RunFolder, expected_bytes: int) -> Iterator[str]:
    found = folder.metrics.stat().st_size if folder.metrics.exists() else 0
    damaged = damaged_metrics(folder.metrics)
    if damaged:
        yield f"{folder.metrics}:{damaged[0]}: damaged, so curves and tables lack this line ({len(damaged)} such lines)"
    if found < expected_bytes:
        yield f"{folder.metrics}: {found} bytes, {expected_bytes} when the checkpoint was written: lines are lost"


def _as_tokenized_then(settings: Settings, folder: RunFolder, now: PreparedData) -> PreparedData:
    """The tokens that the run began with, even if newer versions of the libraries would tokenise differently.

    Raises:
        UserError: those tokens are no longer in the cache, or the run's record of them cannot be read.
    """
    report = read_report(folder)
    then = [row["tokens_key"] for part in ("train", "held_out") for row in report[part]]
    if then == [source.key for source in now.all]:
        return now
    if not all(is_whole(settings.data.cache_dir / key) for key in then):
        raise UserError(
            f"{folder.path}: its data was tokenised by other versions (see environment.json), and those tokens are no "
            f"longer in {settings.data.cache_dir}; install those versions"
        )
    for key in then:
        check_content(settings.data.cache_dir / key)
    return open_data(settings, folder)


def _differences(before: Any, now: Any) -> list[tuple[str, str, str]]:
    """(key, value before, value now), the values as they are shown."""
    return [(key, _short(then), _short(found)) for key, then, found in differing(before, now)]


def _short(value: Any) -> str:
    text = "none" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _go_back_to(checkpoint: Path, folder: RunFolder, settings: Settings, position: Position) -> None:
    """Remove everything that was written after the checkpoint; the resumed run writes it again.

    Raises:
        UserError: the folder cannot be written.
    """
    stale = ("status.json", "DONE", "report.html", "curves.png", "health.png", "held_out.csv")
    for name in stale:
        if (folder.path / name).is_dir() and not (folder.path / name).is_symlink():
            raise UserError(f"{folder.path / name}: a folder, expected a file that the run wrote; move it away")
    try:
        point_latest(folder)  # first: where this fails, nothing else has been touched
        for name in stale:
            (folder.path / name).unlink(missing_ok=True)
        for left in (*folder.path.glob(".*.tmp"), *folder.checkpoints.glob(".*.tmp")):
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left)
            else:
                left.unlink(missing_ok=True)
        for newer in takewhile(lambda path: path != checkpoint, checkpoints_of(folder.path)):
            set_aside(newer)  # damaged: otherwise pruning would count it among the newest ones
        point_latest(folder)
        if folder.metrics.exists():
            # If the file is shorter than recorded, its last line may be incomplete: cut after the last line end.
            kept = folder.metrics.read_bytes()[: position.metrics_bytes].rpartition(b"\n")
            os.truncate(folder.metrics, len(kept[0] + kept[1]))
        cut_after(folder.samples, step_of(checkpoint), Sample)
        cut_after(folder.task_answers, step_of(checkpoint), TaskAnswer)
        write_atomically(folder.recipe, stored_recipe(settings.stored))
        resumed: dict[str, Any] = {"checkpoint": checkpoint.name}
        if position.state.source:
            resumed["source"] = dict(position.state.source)
        write_atomically(folder.resumed, json.dumps(resumed) + "\n")
    except OSError as error:
        raise UserError(f"output: {folder.path} cannot be written ({error.strerror or error})") from None
