"""Start the ranks of a run on this machine, pass on stop signals, and find out how the run ended."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager, suppress
from dataclasses import replace

import torch

from uft_ds.errors import EXIT_BAD_INPUT, EXIT_CRASHED, EXIT_DONE, EXIT_INTERRUPTED, EXIT_STOPPED, UserError
from uft_ds.host.ports import free_port, is_free
from uft_ds.host.process import LAUNCHED_BY
from uft_ds.host.world import given_port
from uft_ds.record.run_folder import RunFolder, Status
from uft_ds.run.order import LaunchedRanks, Order

_POLL_SECONDS = 0.5
_STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}


def number_of_ranks(asked: int | str) -> int:
    """The number of ranks to launch. `auto`: one per GPU, or two on a machine without GPUs.

    Raises:
        UserError: more ranks than GPUs are requested.
    """
    gpus = torch.cuda.device_count()
    if asked == "auto":
        return gpus or 2
    if gpus and int(asked) > gpus:
        raise UserError(f"launch.ranks: {asked} asked for, but this machine has {gpus} GPUs")
    return int(asked)


def master_port() -> int:
    """MASTER_PORT if it is set, otherwise a free port.

    Raises:
        UserError: MASTER_PORT is not a port number, or the port is in use.
    """
    given = given_port()
    if given is None:
        return free_port()
    if not is_free(given):
        raise UserError(f"port {given} is in use; unset MASTER_PORT, or give a free one")
    return given


def launch(
    folder: RunFolder,
    start: Callable[[Order], LaunchedRanks],
    *,
    ranks: int,
    port: int,
    options: tuple[str, ...] = (),
    say: Callable[[str], None] = print,
) -> Status:
    """Run `uft_ds.train` on `ranks` processes until they end; the caller has prepared and locked the folder.

    A signal that asks to stop is passed on to the ranks, which save a checkpoint first; a second Ctrl-C ends them at
    once.
    """
    folder.launcher_log.write_text("")
    arguments = (str(folder.recipe), "--prepared", *options)
    heard: list[int] = []
    with _noting(heard):
        launched = start(Order(arguments, rank_environment(ranks), ranks, port, folder.launcher_log))
        try:
            codes = _ended(launched, heard, say)
        except BaseException:  # the caller lets go of the folder's lock: no rank must be left that writes there
            launched.end()
            raise
        if codes is None:
            return _written(folder, Status(EXIT_INTERRUPTED, "interrupted"))
    if folder.done.exists():  # written last: whatever has ended the processes since then, nothing is missing
        return _written(folder, Status(EXIT_DONE, "done"))
    # A killed rank leaves no status file; the status that another rank left would name a mere consequence.
    killed = [f"rank {rank} was killed (signal {-code})" for rank, code in codes.items() if code < 0]
    if killed:
        why = f"{', '.join(killed)}: out of memory? See {folder.launcher_log} and the system's log"
        return _written(folder, Status(EXIT_CRASHED, why))
    if heard and EXIT_STOPPED in codes.values():
        status = folder.read_status() or Status(EXIT_STOPPED, "stopped before it trained; nothing is lost")
        # The ranks received SIGUSR1, whichever signal the user sent to this process.
        status = replace(status, message=status.message.replace("SIGUSR1", signal.Signals(heard[0]).name))
        return _written(folder, status)
    why = "as when the process that started them is killed" if not codes else f"exit codes {sorted(codes.values())}"
    silent = Status(EXIT_CRASHED, f"the ranks ended without a status, {why}; see {folder.launcher_log}")
    return folder.read_status() or _said_for_the_ranks(folder, silent)


def _ended(launched: LaunchedRanks, heard: Seq[int], say: Callable[[str], None]) -> dict[int, int] | None:
    """Wait for the ranks, and pass on what is heard; their exit codes, or None after a second Ctrl-C."""
    has_said = False
    while (codes := launched.poll(_POLL_SECONDS)) is None:
        if heard.count(signal.SIGINT) > 1:
            launched.end()
            return None
        if heard:
            if not has_said:
                say("stopping: the step that is running is finished and saved first (Ctrl-C again: at once)")
                has_said = True
            launched.ask_to_stop()
    return codes


def _said_for_the_ranks(folder: RunFolder, status: Status) -> Status:
    """The status, after it has been written; where that is impossible, this is why the ranks were silent."""
    try:
        folder.write_status(status)
    except OSError as error:
        why = f"output: {folder.path} cannot be written ({error.strerror or error}); {status.message}"
        return Status(EXIT_BAD_INPUT, why)
    return status


def _written(folder: RunFolder, status: Status) -> Status:
    """The status, after it has replaced what the ranks wrote: `uft status` tells what the terminal told."""
    with suppress(OSError):  # a full disk may be why the ranks ended
        folder.write_status(status)
    return status


@contextmanager
def _noting(heard: list[int]) -> Iterator[None]:
    """Within the block, a signal that asks to stop is only recorded in `heard`."""
    before = {number: signal.signal(number, lambda number, _: heard.append(number)) for number in _STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def rank_environment(ranks: int) -> dict[str, str]:
    """The environment of the ranks: this process's, with defaults for variables that the user has not set."""
    defaults = {
        "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // ranks)),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }
    return defaults | dict(os.environ) | {LAUNCHED_BY: str(os.getpid())}
