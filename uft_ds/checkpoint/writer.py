"""Asynchronous checkpoints: training waits only for the copy to host memory, a thread writes the files.

    every rank:  copy to host memory -> thread: write own files, read back, sync, hash
    all ranks, between two steps:  agree that all files are written
    rank 0:  write manifest -> rename -> update `latest` -> delete old checkpoints

A checkpoint is complete or absent. If one cannot be written, the older ones stay unchanged.
"""

from __future__ import annotations

import shutil
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from uft_ds.checkpoint.folder import checkpoints_of, name_of, point_latest, prune, remove
from uft_ds.checkpoint.manifest import Written, write_manifest
from uft_ds.checkpoint.owner import owner_of
from uft_ds.checkpoint.snapshot import Snapshot, take_snapshot, write_snapshot
from uft_ds.checkpoint.state import Position
from uft_ds.engine.engine import Engine
from uft_ds.errors import CheckFailed, UserError
from uft_ds.host.files import sync
from uft_ds.known.cache import Known
from uft_ds.record.report import Speaker
from uft_ds.record.run_folder import RunFolder
from uft_ds.streams.adapter_files import CONFIG
from uft_ds.streams.adapters import adapter_config_of
from uft_ds.streams.nf4 import MARK, held_in_nf4
from uft_ds.streams.policy import Adapted, Policy, adapted, trains_all
from uft_ds.streams.stream import REWARD

_SECONDS_FOR_OTHERS_FILES = 60.0
"""Longest wait for a file of another machine to become visible: some shared file systems show it with a delay."""


@dataclass
class _Writing:
    """A checkpoint that is being written. The thread sets `files` or `problem`, then ends."""

    step: int
    files: dict[str, Written] = field(default_factory=dict)
    problem: Exception | None = None


class CheckpointWriter:
    """Writes a run's checkpoints, one at a time. Every rank has one and calls the same methods in the same order."""

    def __init__(
        self, engine: Engine, policy: Policy, folder: RunFolder, reporter: Speaker, *, keep: int, best: str | None
    ) -> None:
        self._engine, self._policy, self._folder, self._reporter = engine, policy, folder, reporter
        self._keep, self._best = keep, best
        with_head = REWARD in engine.streams.values()
        self._beside = {} if trains_all(policy) else _beside_the_adapter(adapted(policy), with_head=with_head)
        self._owner = owner_of(folder)
        self._writing: _Writing | None = None
        self._thread = threading.Thread()
        self._polled_seconds = 0.0

    def start(self, position: Position, reference: Known) -> float:
        """Copy the state to host memory and start to write it.

        Returns:
            Seconds that training waited: for the copy, for an older checkpoint that was still being written, and in
            calls of `poll` since the last `start`.
        """
        started = time.perf_counter()
        self.poll(wait=True)
        polled_seconds, self._polled_seconds = self._polled_seconds, 0.0
        snapshot = take_snapshot(self._engine, self._policy, position, reference, self._beside, self._owner)
        step = position.state.step
        self._writing = _Writing(step)
        self._thread = threading.Thread(
            target=_write, args=(self._writing, snapshot, self._temporary(step)), daemon=True
        )
        self._thread.start()
        return polled_seconds + time.perf_counter() - started

    def poll(self, *, wait: bool = False) -> Exception | None:
        """Complete a checkpoint that all ranks have written. Every rank must call it, between two steps.

        Returns:
            The error, the same on every rank, or None. It has already been reported as a warning.
        """
        if self._writing is None:
            return None
        started = time.perf_counter()
        problem = self._finish(self._writing, wait)
        self._polled_seconds += time.perf_counter() - started
        return problem

    def finish(self) -> None:
        """Wait for the last checkpoint.

        Raises:
            UserError: it could not be written. CheckFailed: its files failed the check after writing.
        """
        problem = self.poll(wait=True)
        if isinstance(problem, CheckFailed):
            raise CheckFailed(f"the last checkpoint: {problem}")
        if problem is not None:
            raise UserError(f"the last checkpoint could not be written: {problem}")

    def _finish(self, writing: _Writing, wait: bool) -> Exception | None:
        if wait:
            self._thread.join()
        # Every rank decides from the same gathered list, so all commit, or all wait, in the same call.
        everyone = self._engine.gather_objects((not self._thread.is_alive(), writing.files, writing.problem))
        if not all(is_done for is_done, _, _ in everyone):
            return None
        self._writing = None
        problem = next((why for _, _, why in everyone if why is not None), None)
        if problem is None and self._engine.rank == 0:
            files = {name: written for _, of_rank, _ in everyone for name, written in of_rank.items()}
            try:
                self._commit(writing.step, files)
            except Exception as error:  # noqa: BLE001 - the other ranks wait for it below
                problem = _sayable(error, "rank 0")
        problem = self._engine.gather_objects(problem)[0]
        if problem is not None:
            self._abandon(writing.step, problem)
        return problem

    def _temporary(self, step: int) -> Path:
        return self._folder.checkpoints / f".{name_of(step)}.tmp"

    def _commit(self, step: int, files: dict[str, Written]) -> None:
        temporary, target = self._temporary(step), self._folder.checkpoints / name_of(step)
        _await_files(temporary, files)
        write_manifest(temporary, files)
        sync(temporary)
        # The rename makes the checkpoint visible, so everything in it must be on the disk before.
        if target.exists():
            remove(target)
        temporary.rename(target)
        sync(self._folder.checkpoints)
        try:
            point_latest(self._folder)
            prune(self._folder, keep=self._keep, best=self._best)
        except OSError as error:  # the new checkpoint is complete all the same
            self._reporter.warn(f"older checkpoints than {target.name} could not be deleted ({error})")

    def _abandon(self, step: int, problem: Exception) -> None:
        if self._engine.rank == 0:
            shutil.rmtree(self._temporary(step), ignore_errors=True)
        last = next((path.name for path in checkpoints_of(self._folder.path)), None)
        kept = f"the last one is {last}" if last else "there is none yet"
        self._reporter.warn(f"checkpoint {name_of(step)} could not be written ({problem}); {kept}")


def _beside_the_adapter(policy: Adapted, *, with_head: bool) -> dict[str, bytes]:
    """The files beside an adapter's tensors, by name: its config, and on which base it belongs, if that is in NF4.

    A copy of the folder elsewhere must say the latter by itself: nothing else in it tells such a base from a plain one.
    """
    nf4 = held_in_nf4(policy)
    mark = {} if nf4 is None else {MARK: nf4.mark}
    return {CONFIG: adapter_config_of(policy, with_head=with_head), **mark}


def _write(writing: _Writing, snapshot: Snapshot, folder: Path) -> None:
    try:
        writing.files = write_snapshot(snapshot, folder)
    except BaseException as error:  # noqa: BLE001 - the main thread reports it, between two steps
        writing.problem = _sayable(error, f"rank {snapshot.rank}")


def _sayable(error: BaseException, where: str) -> Exception:
    """The error in a form that can be pickled and sent to the other ranks."""
    if isinstance(error, CheckFailed):
        return CheckFailed(f"{where}: {error}")
    kind = "" if isinstance(error, OSError) else f"{type(error).__name__}: "
    return RuntimeError(f"{where}: {kind}{error}")


def _await_files(folder: Path, files: dict[str, Written]) -> None:
    """Wait until the files of all machines are visible in the shared folder.

    Raises:
        OSError: a file did not appear in time.
    """
    deadline = time.monotonic() + _SECONDS_FOR_OTHERS_FILES
    for name, written in files.items():
        while True:
            with suppress(FileNotFoundError):
                if (folder / name).stat().st_size == written.num_bytes:
                    break
            if time.monotonic() > deadline:
                raise OSError(f"{folder / name}: written by another machine, not seen here: is the output shared?")
            time.sleep(0.1)
