"""The layout of a run's checkpoint folders, and functions to list, verify, rename and delete them.

`manifest.py` verifies the files of one checkpoint; `writer.py` creates checkpoints.
"""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from uft_ds.checkpoint.manifest import MANIFEST, manifest_problem, recorded_files
from uft_ds.checkpoint.owner import owner_of
from uft_ds.checkpoint.shard_names import world_size_of
from uft_ds.checkpoint.state import TRAINER, claims_of, has_adapter, step_and_owner
from uft_ds.errors import UserError
from uft_ds.recipe.best import badness
from uft_ds.record.metrics_file import read_metrics
from uft_ds.record.run_folder import CHECKPOINTS, COPIED_LATEST, RunFolder

ADAPTER, OPTIMIZER = "adapter", "optimizer"
ADAPTER_WEIGHTS, ADAPTER_CONFIG = f"{ADAPTER}/adapter_model.safetensors", f"{ADAPTER}/adapter_config.json"
_PREFIX = "step-"
_DAMAGED = ".damaged"


def name_of(step: int) -> str:
    """The folder name of a step's checkpoint."""
    return f"{_PREFIX}{step:06d}"


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint's folder is named after."""
    return int(checkpoint.name.removeprefix(_PREFIX).removesuffix(_DAMAGED))


def is_named_by_step(checkpoint: Path) -> bool:
    """Whether a folder has the name that a run gives its checkpoints; a copy may have another."""
    return re.fullmatch(rf"{_PREFIX}\d+({re.escape(_DAMAGED)})?", checkpoint.name) is not None


def checkpoints_of(run: Path) -> list[Path]:
    """All checkpoints in a run's folder, the newest first, complete or not."""
    return _folders_of_steps(run, "")


def set_aside_of(run: Path) -> list[Path]:
    """Damaged checkpoints that `set_aside` has renamed, the newest first."""
    return _folders_of_steps(run, _DAMAGED)


def _folders_of_steps(run: Path, suffix: str) -> list[Path]:
    pattern = re.compile(rf"{_PREFIX}\d+{re.escape(suffix)}")
    found = (path for path in (run / CHECKPOINTS).glob(f"{_PREFIX}*") if pattern.fullmatch(path.name))
    return sorted(found, key=step_of, reverse=True)


def checkpoint_problem(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint; None if its files are as they were written, and are its run's and its step's."""
    problem = manifest_problem(checkpoint)
    if problem is not None:
        return problem
    listed, claims = recorded_files(checkpoint), claims_of(checkpoint)
    needed = (TRAINER, ADAPTER_WEIGHTS, ADAPTER_CONFIG) if has_adapter(claims) else (TRAINER,)
    missing = [name for name in needed if name not in listed]
    if missing:
        return f"{checkpoint / MANIFEST}: does not list {missing[0]}"
    shards = sorted(Path(name).name for name in listed if Path(name).parent == Path(OPTIMIZER))
    if world_size_of(shards) is None:
        return f"{checkpoint / MANIFEST}: does not list the files of all ranks below {OPTIMIZER}/, only {shards}"
    extra = {path.name for path in (checkpoint / OPTIMIZER).glob("*.safetensors")} - set(shards)
    if extra:
        return f"{checkpoint / OPTIMIZER / min(extra)}: not in the manifest"
    return _foreign(checkpoint, claims)


def _foreign(checkpoint: Path, claims: Mapping[str, Any]) -> str | None:
    """Says that a checkpoint, whole as it may be, is of another run or step than the place where it lies."""
    path = checkpoint / TRAINER
    try:
        step, owner = step_and_owner(claims)
    except ValueError:
        return None  # what a resume reads of it, `read_position` checks and names
    if is_named_by_step(checkpoint) and step != step_of(checkpoint):
        return f"{path}: is of step {step}, its folder is called {checkpoint.name}"
    if checkpoint.parent.name != CHECKPOINTS:  # a copy elsewhere
        return None
    run = RunFolder(checkpoint.parent.parent)
    try:
        expected = owner_of(run)
    except UserError:
        return None  # whoever needs identity.json names it
    if expected is None or owner == expected:
        return None
    if owner is None:
        return f"{path}: does not say whose it is, so it is not of the run in {run.path}"
    differs = "recipe" if owner.recipe != expected.recipe else "base or data"
    return f"{path}: is of another run, with another {differs} than the run in {run.path}"


def _damage(checkpoint: Path) -> str | None:
    """As `checkpoint_problem`, but a checkpoint of another version is an error of its own: it is not damaged.

    Raises:
        UnknownFormat: its manifest has another format version.
    """
    with suppress(OSError, ValueError):
        recorded_files(checkpoint)
    return checkpoint_problem(checkpoint)


def newest_whole(run: Path) -> tuple[Path | None, list[str]]:
    """The newest intact checkpoint of a run (None if there is none), and the problems of the newer ones.

    Raises:
        UserError: a checkpoint has another format version. It is not damaged, so an older one must not replace it.
    """
    problems: list[str] = []
    for checkpoint in checkpoints_of(run):
        problem = _damage(checkpoint)
        if problem is None:
            return checkpoint, problems
        problems.append(f"checkpoint {checkpoint.name} cannot be used: {problem}")
    return None, problems


def latest_checkpoint(run: Path) -> Path:
    """The newest checkpoint of a run, or `run` itself if it is a checkpoint; its files have been verified.

    Raises:
        UserError: there is no checkpoint, or it is damaged or has another format version; names the file.
    """
    run = run.resolve()  # `latest` is a link
    candidates = [run] if (run / MANIFEST).exists() else checkpoints_of(run)
    if not candidates:
        raise UserError(f"{run}: holds no checkpoint; expected a run's folder or one of its checkpoints/step-N")
    problem = _damage(candidates[0])
    if problem is not None:
        others = f"; older ones: {', '.join(c.name for c in candidates[1:])}" if candidates[1:] else ""
        raise UserError(f"checkpoint {candidates[0].name} cannot be used: {problem}{others}")
    return candidates[0]


def best_checkpoint(folder: RunFolder, metric: str) -> Path | None:
    """The existing checkpoint at whose step the metric was best; the earliest one if several are equal.

    Step 0, where nothing is trained, is the best only if no later one equals it.
    """
    values = {
        line["step"]: badness(metric, line[metric])
        for line in read_metrics(folder.metrics)
        if line.get(metric) is not None
    }
    known = [path for path in checkpoints_of(folder.path) if step_of(path) in values]
    return min(known, key=lambda path: (values[step_of(path)], step_of(path) == 0, step_of(path)), default=None)


def run_of_adapter(adapter: Path) -> RunFolder | None:
    """The run in one of whose checkpoints an adapter lies, if the run says what its base is; otherwise None."""
    real = adapter.resolve()
    if real.name != ADAPTER or real.parent.parent.name != CHECKPOINTS:
        return None
    run = RunFolder(real.parent.parent.parent)
    return run if run.identity.exists() else None


def point_latest(folder: RunFolder) -> None:
    """Point the link `latest` at the newest checkpoint, or delete it if there is none.

    A folder in its place is a checkpoint that `cp -L` made of the link. It is renamed and kept.
    """
    newest = next(iter(checkpoints_of(folder.path)), None)
    if folder.latest.is_dir() and not folder.latest.is_symlink():  # the run was copied with its links resolved
        folder.latest.rename(_free_name(folder.path / COPIED_LATEST))
    if newest is None:
        folder.latest.unlink(missing_ok=True)
        return
    link = folder.path / ".latest.tmp"
    link.unlink(missing_ok=True)
    link.symlink_to(newest.relative_to(folder.path))
    link.replace(folder.latest)  # atomic: a reader sees the old link or the new one, never none


def _free_name(path: Path) -> Path:
    """The path, or with a number behind it where that name is taken."""
    names = (path if number == 1 else path.with_name(f"{path.name}.{number}") for number in itertools.count(1))
    return next(name for name in names if not name.exists() and not name.is_symlink())


def set_aside(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint so that it is no longer listed; it is kept for inspection."""
    aside = checkpoint.with_name(checkpoint.name + _DAMAGED)
    if aside.is_symlink() or aside.exists():
        remove(aside)
    return checkpoint.rename(aside)


def prune(folder: RunFolder, *, keep: int, best: str | None) -> None:
    """Delete all checkpoints except the newest `keep`, and the best one by the metric `best`."""
    kept = best_checkpoint(folder, best) if best else None
    for old in checkpoints_of(folder.path)[keep:]:
        if old != kept:
            remove(old)


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint, its manifest first, so that an interrupted deletion leaves nothing that looks complete.

    Of a checkpoint that is a link, as one that was moved to another disk, the link alone is deleted.
    """
    if checkpoint.is_symlink():
        checkpoint.unlink()
        return
    (checkpoint / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)
