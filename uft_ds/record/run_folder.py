"""A run's folder: the names of its files, its owner (a lock), and the status with which the run ended."""

from __future__ import annotations

import json
import os
import shutil
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from uft_ds.errors import UserError
from uft_ds.host.files import read_regular_text, write_atomically
from uft_ds.host.locks import Held, Lock, NoLocks, acquire, is_held

CHECKPOINTS = "checkpoints"
_OF_A_RUN = (
    "recipe.yaml", "environment.json", "metrics.jsonl", "tensorboard", "wandb", CHECKPOINTS,
    "latest", "data", "status.json", "report.html", "curves.png", "health.png", "held_out.csv", "samples.jsonl",
    "tasks.jsonl", "launcher.log", "DONE",
    "quickstart.json", "identity.json", "resumed.json", "wandb-id", "rollouts", "adapters",
)  # fmt: skip
"""Files and folders that a run creates. `--overwrite` deletes only these, logs of ranks and temporary files."""

COPIED_LATEST = "latest.copied"
"""Name (or its beginning) of a folder that took the place of the link `latest`, and was put aside."""
_WRITTEN_IN_PLACE = ("metrics.jsonl", "launcher.log", "DONE")
"""Files that a run opens for writing where they lie; all others are replaced by new ones."""

_IN_USE = "is in use by a run that is still running; stop that run first"
_SECONDS_OF_A_LOOK = 1.0
"""How long to wait for the lock, because `is_owned` in another process holds it for a moment."""
_LOCK_REMEDY = (
    "give a folder on another file system by output=PATH, or mount this one with locks (NFS: without nolock; Lustre: "
    "with flock)"
)


@dataclass(frozen=True)
class Status:
    """How a run ended. The process that started it reads this, because launchers hide their workers' exit codes."""

    exit_code: int
    message: str


@dataclass(frozen=True)
class RunFolder:
    """The paths of a run's files."""

    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def identity(self) -> Path:
        """Hashes of the run's inputs; a restart must have the same ones."""
        return self.path / "identity.json"

    @property
    def resumed(self) -> Path:
        """The checkpoint that the run resumes from; absent in a run that starts at step 0."""
        return self.path / "resumed.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def held_out_rows(self) -> Path:
        """The table of all held-out responses from the newest evaluation."""
        return self.path / "held_out.csv"

    @property
    def samples(self) -> Path:
        """Answers of the policy to held-out prompts, if the recipe asks for some."""
        return self.path / "samples.jsonl"

    @property
    def task_answers(self) -> Path:
        return self.path / "tasks.jsonl"

    @property
    def rollouts(self) -> Path:
        """The record of an online run: the policy's answers and their scores."""
        return self.path / "rollouts"

    @property
    def adapters(self) -> Path:
        """The newest versions of the policy's adapter, from where a server reads them."""
        return self.path.absolute() / "adapters"

    @property
    def curves_picture(self) -> Path:
        return self.path / "curves.png"

    @property
    def health_picture(self) -> Path:
        return self.path / "health.png"

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS

    @property
    def latest(self) -> Path:
        return self.path / "latest"

    @property
    def launcher_log(self) -> Path:
        return self.path / "launcher.log"

    @property
    def done(self) -> Path:
        return self.path / "DONE"

    @property
    def lock(self) -> Path:
        return self.path / ".uft-run"

    def sample_data(self) -> Path:
        """A few of the run's sequences (held-out ones if there are any), with which a trained model can be checked."""
        return self.path / "data" / "sample"

    def start(self) -> Path:
        """The log-ratios that the policy must have before the first step, if it starts from an adapter."""
        return self.path / "data" / "start.json"

    def quarantine(self) -> Path:
        """The rows that were left out because they cannot be read, each with the reason."""
        return self.path / "data" / "quarantine.jsonl"

    def data_report(self) -> Path:
        return self.path / "data" / "report.json"

    def log(self, rank: int) -> Path:
        return self.path / f"log-rank{rank}.txt"

    def write_status(self, status: Status) -> None:
        write_atomically(self.path / "status.json", json.dumps(asdict(status), indent=2) + "\n")

    def write_first_status(self, status: Status) -> None:
        """Write a status unless one exists already.

        The first rank that fails knows the reason; the others only see its connections close.
        """
        write_first(self.path / "status.json", status)

    def read_status(self) -> Status | None:
        """The run's status; None while it is running, or if it was killed before it could write one."""
        try:
            return Status(**json.loads(read_regular_text(self.path / "status.json")))
        except (OSError, ValueError, TypeError):
            return None


def write_first(path: Path, status: Status) -> None:
    """Write a status unless one exists; ranks of other machines may write at once. A failure is printed, not raised.

    A hard link makes the write atomic. On a file system without hard links (FAT, some FUSE and network file systems)
    the file is created exclusively, and a reader may find it incomplete for a moment, which counts as no status.
    """
    text = json.dumps(asdict(status), indent=2) + "\n"
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        try:
            temporary.write_text(text, encoding="utf-8")
            path.hardlink_to(temporary)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
    except FileExistsError:
        return
    except OSError:
        _create_exclusively(path, text, status)


def _create_exclusively(path: Path, text: str, status: Status) -> None:
    try:
        with path.open("x", encoding="utf-8") as file:  # O_CREAT | O_EXCL
            try:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                path.unlink()  # an incomplete status would keep other ranks from writing theirs
                raise
    except FileExistsError:
        return
    except OSError as error:
        # The process is ending for the reason in `status`; an error raised here would hide it.
        print(f"warning: {path} cannot be written ({error.strerror}): {status.message}", file=sys.stderr)


def has_trained(folder: RunFolder) -> bool:
    """Whether a run in the folder has made a step, so that something would be lost with it.

    An evaluation before the first step is no step. What cannot be read counts as something to lose.
    """
    if folder.done.exists() or (folder.checkpoints.is_dir() and any(folder.checkpoints.iterdir())):
        return True
    try:
        lines = read_regular_text(folder.metrics).splitlines() if folder.metrics.exists() else []
        return any(json.loads(line)["step"] > 0 for line in lines)
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return True


def check_claimable(folder: RunFolder, *, overwrite: bool) -> None:
    """Refuse a folder that holds a run or other files, before time is spent on preparing data.

    A run that was stopped before its first step does not count, because nothing is lost with it.

    Raises:
        UserError: the message says what the folder holds and what to do.
    """
    path = folder.path
    if path.exists() and not path.is_dir():
        raise UserError(f"output: {path} is a file, expected a folder")
    if not path.exists() or not any(path.iterdir()):
        return
    # Every run creates the lock first. A recipe.yaml is no evidence of a run; it may be the user's own file.
    if not folder.lock.exists():
        raise UserError(f"output: {path} holds files that are not from a run of uft; give another folder")
    if not overwrite and has_trained(folder):
        raise _holds_a_run(folder)
    if not overwrite and is_owned(folder):
        raise UserError(f"output: {path} {_IN_USE}")


def _holds_a_run(folder: RunFolder) -> UserError:
    state = "is done;" if folder.done.exists() else "did not finish; continue it with --resume,"
    return UserError(
        f"output: {folder.path} already holds a run that {state} delete it with --overwrite, "
        "or give another folder by output=PATH"
    )


def claim(folder: RunFolder, *, overwrite: bool, lock: Lock | None = None) -> Lock:
    """Create the folder and lock it; delete an older run in it, with `overwrite` or if it never made a step.

    Args:
        lock: the folder's lock, if it is locked already.
    Returns:
        the lock; this process owns the folder until the lock is closed or the process ends.
    Raises:
        UserError: the folder holds a run, another process owns it, it cannot be written, or its file system has no
            locks.
    """
    check_claimable(folder, overwrite=overwrite)
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output: {folder.path} cannot be written ({error.strerror})") from None
    lock = lock or claim_again(folder)
    if not overwrite and has_trained(folder):  # since the check, by a process that has ended meanwhile
        lock.close()
        raise _holds_a_run(folder)
    try:
        _empty(folder.path)
    except OSError as error:  # shutil names a file without its folder
        lock.close()
        why = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        raise UserError(f"output: {folder.path} cannot be emptied ({why})") from None
    return lock


def claim_again(folder: RunFolder) -> Lock:
    """Lock a run's folder for a run, without changing its files.

    Raises:
        UserError: another process owns the folder, it cannot be written, or its file system has no locks.
    """
    # Without a lock a restart could write at the same time as the run that it replaces.
    return locked(folder, name=f"output: {folder.path}", without_locks=f"two runs could write to it; {_LOCK_REMEDY}")


def check_ownable(folder: RunFolder) -> None:
    """As `claim`, but leave nothing behind: a folder that exists must be writable and free, another one creatable.

    Raises:
        UserError: another process owns the folder, it cannot be written, or its file system has no locks.
    """
    name = f"output: {folder.path}"
    if folder.lock.exists():
        owned = is_owned(folder)
        if owned is None:
            raise UserError(f"{name} cannot be locked, so two runs could write to it; {_LOCK_REMEDY}")
        if owned:
            raise UserError(f"{name} is in use by a run that is still running; stop that run first")
        if not os.access(folder.path, os.W_OK):
            raise UserError(f"{name} cannot be written")
        return
    existing = next(parent for parent in (folder.path, *folder.path.absolute().parents) if parent.exists())
    if not existing.is_dir():
        raise UserError(f"output: {existing} is a file, expected a folder")
    probe = existing / f".uft-probe.{uuid.uuid4().hex}.tmp"
    try:
        acquire(probe).delete()
    except NoLocks as error:
        probe.unlink(missing_ok=True)
        raise UserError(
            f"{name} cannot be locked ({error.strerror}), so two runs could write to it; {_LOCK_REMEDY}"
        ) from None
    except OSError as error:
        raise UserError(f"{name} cannot be written ({error.strerror})") from None


def locked(folder: RunFolder, *, name: str, without_locks: str) -> Lock:
    """Lock a run's folder without changing its files.

    Args:
        name: what messages call the folder.
        without_locks: what follows where the file system has no locks, and what to do.
    Raises:
        UserError: another process owns the folder, it cannot be written, or its file system has no locks.
    """
    try:
        return acquire(folder.lock, wait_seconds=_SECONDS_OF_A_LOOK)
    except Held:
        raise UserError(f"{name} {_IN_USE}") from None
    except NoLocks as error:
        raise UserError(f"{name} cannot be locked ({error.strerror}), so {without_locks}") from None
    except OSError as error:
        raise UserError(f"{name} cannot be written ({error.strerror})") from None


def check_own_files(folder: RunFolder) -> None:
    """Refuse a run's folder in which a file that the run writes in place is a link, or is no file.

    A link may lead to a file outside of the run, which would be cut or written to. Also refuse a `checkpoints` that is
    no folder, or a link to a disk that is not there now: the run would begin at step 0, and be deleted for that.

    Raises:
        UserError: names the file.
    """
    checkpoints = folder.checkpoints
    if not checkpoints.is_dir() and (checkpoints.exists() or checkpoints.is_symlink()):
        what = f"a link to {checkpoints.readlink()}, which is not there" if checkpoints.is_symlink() else "a file"
        raise UserError(f"{checkpoints}: {what}, expected the folder that the run wrote; bring it back")
    for path in (*(folder.path / name for name in _WRITTEN_IN_PLACE), *folder.path.glob("log-rank*.txt")):
        if path.is_symlink():
            raise UserError(
                f"{path}: a link to {path.readlink()}, expected a file of the run's own; nothing is written through a "
                "link: put a copy of the file in its place, or delete the link"
            )
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: not a file, expected one that the run wrote; move it away")


@contextmanager
def reading_identity(folder: RunFolder) -> Iterator[Any]:
    """The content of a run's identity.json. Within the block, a part that is lacking or of another type is an error.

    Raises:
        UserError: the file is not there, cannot be read, or is not what a run wrote.
    """
    try:
        yield json.loads(read_regular_text(folder.identity))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{folder.identity}: cannot be read ({type(error).__name__}: {error}); it identifies the run, its base and "
            "its data: bring it back from a copy of the run"
        ) from None


def is_owned(folder: RunFolder) -> bool | None:
    """Whether a process holds the lock, which means that the run is running. None: the file system has no locks.

    Raises:
        UserError: the lock file cannot be opened.
    """
    try:
        return is_held(folder.lock)
    except NoLocks:
        return None
    except OSError as error:
        raise UserError(f"{folder.lock}: cannot be read ({error.strerror})") from None


def release(folder: RunFolder, lock: Lock) -> None:
    """Undo `claim` after a failure, so that nothing is left of a run that never began."""
    _empty(folder.path)
    lock.delete()
    with suppress(OSError):  # the folder holds files of the user
        folder.path.rmdir()


def _empty(path: Path) -> None:
    for entry in path.iterdir():
        is_temporary = entry.name.startswith(".") and entry.name.endswith(".tmp")
        if not (entry.name in _OF_A_RUN or entry.name.startswith(("log-rank", COPIED_LATEST)) or is_temporary):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
