"""Start the ranks of a run on this machine with torchrun, pass on stop signals, and find out how the run ended."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

import psutil
import torch

from uft_ds.errors import EXIT_BAD_INPUT, EXIT_CRASHED, EXIT_DONE, EXIT_INTERRUPTED, EXIT_STOPPED, UserError
from uft_ds.host.ports import free_port, is_free
from uft_ds.host.process import LAUNCHED_BY, die_with_parent
from uft_ds.host.world import given_port
from uft_ds.record.run_folder import RunFolder, Status

_SECONDS_TO_STOP = 15
_POLL_SECONDS = 0.5
_STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}
RANK_MODULE = "uft_ds.train"


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
    folder: RunFolder, *, ranks: int, port: int, options: tuple[str, ...] = (), say: Callable[[str], None] = print
) -> Status:
    """Run `uft_ds.train` on `ranks` processes until they end; the caller has prepared and locked the folder.

    A signal that asks to stop is passed on to the ranks, which save a checkpoint first; a second Ctrl-C ends them at
    once. torchrun's own output goes to launcher.log, because it replaces exit codes and prints a traceback for each.
    """
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node", str(ranks)),
        *("--master-addr", "127.0.0.1", "--master-port", str(port), "--max-restarts", "0"),
        *("-m", RANK_MODULE, str(folder.recipe), "--prepared", *options),
    ]
    heard: list[int] = []
    with folder.launcher_log.open("w", encoding="utf-8") as log, _noting(heard):
        process = subprocess.Popen(
            command, stderr=log, env=rank_environment(ranks), start_new_session=True, preexec_fn=_as_child
        )
        has_said = False
        while True:
            with suppress(subprocess.TimeoutExpired):
                process.wait(_POLL_SECONDS)
                break
            if heard.count(signal.SIGINT) > 1:
                _stop(process)
                return _written(folder, Status(EXIT_INTERRUPTED, "interrupted"))
            if heard:
                if not has_said:
                    say("stopping: the step that is running is finished and saved first (Ctrl-C again: at once)")
                    has_said = True
                _ask_to_stop(process)
    if folder.done.exists():  # written last: whatever has ended the processes since then, nothing is missing
        return _written(folder, Status(EXIT_DONE, "done"))
    # A killed rank leaves no status file; the status that another rank left would name a mere consequence.
    codes = _exit_codes(folder)
    killed = [f"rank {rank} was killed (signal {-code})" for rank, code in codes.items() if code < 0]
    if killed:
        why = f"{', '.join(killed)}: out of memory? See {folder.launcher_log} and the system's log"
        return _written(folder, Status(EXIT_CRASHED, why))
    if heard and EXIT_STOPPED in codes.values():
        status = folder.read_status() or Status(EXIT_STOPPED, "stopped before it trained; nothing is lost")
        # The ranks received SIGUSR1, whichever signal the user sent to this process.
        status = replace(status, message=status.message.replace("SIGUSR1", signal.Signals(heard[0]).name))
        return _written(folder, status)
    if process.returncode < 0:
        why = f"the launcher, torchrun, was killed (signal {-process.returncode}), and the ranks died with it"
        silent = Status(EXIT_CRASHED, f"{why}: out of memory? See the system's log")
    else:
        silent = Status(EXIT_CRASHED, f"the ranks ended without a status; see {folder.launcher_log}")
    return folder.read_status() or _said_for_the_ranks(folder, silent)


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


def _as_child() -> None:
    """Set up signals in the child process before its program starts."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # the ranks inherit this until they install their handler
    die_with_parent()


def _ask_to_stop(launcher: subprocess.Popen[bytes]) -> None:
    """Signal the ranks. The caller repeats it, because a rank that has just started ignores the signal."""
    with suppress(psutil.Error):
        for child in psutil.Process(launcher.pid).children(recursive=True):
            with suppress(psutil.Error):
                if RANK_MODULE in child.cmdline():
                    child.send_signal(signal.SIGUSR1)


def rank_environment(ranks: int) -> dict[str, str]:
    """The environment of the ranks: this process's, with defaults for variables that the user has not set."""
    defaults = {
        "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // ranks)),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }
    return defaults | dict(os.environ) | {LAUNCHED_BY: str(os.getpid())}


def _stop(process: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(timeout=_SECONDS_TO_STOP)
            return
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def _exit_codes(folder: RunFolder) -> dict[int, int]:
    """Exit codes of the failed ranks, by rank, read from torchrun's log: a killed rank cannot write its own status."""
    log = folder.launcher_log.read_text(encoding="utf-8", errors="replace")
    found = re.findall(r"failed \(exitcode: (-?\d+)\) local_rank: (\d+)", log)
    return {int(rank): int(code) for code, rank in found}
