"""Starting the ranks of a run on this machine, and learning how it ended."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys

import torch

from uft_ds.errors import UserError
from uft_ds.training.run_folder import RunFolder, Status

EXIT_CRASHED = 1
EXIT_INTERRUPTED = 130
_SECONDS_TO_STOP = 15


def number_of_ranks(asked: int | str) -> int:
    """`auto`: one a GPU, two on a CPU.

    Raises:
        UserError: more ranks than GPUs.
    """
    gpus = torch.cuda.device_count()
    if asked == "auto":
        return gpus or 2
    if gpus and int(asked) > gpus:
        raise UserError(f"launch.ranks: {asked} asked for, but this machine has {gpus} GPUs")
    return int(asked)


def master_port() -> int:
    """MASTER_PORT where it is set, a free port otherwise.

    Raises:
        UserError: the given port is taken.
    """
    given = os.environ.get("MASTER_PORT")
    if given is not None and not (given.isdigit() and 0 < int(given) < 65536):
        raise UserError(f"MASTER_PORT: found {given!r}, expected a port number")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", int(given or 0)))
        except OSError:
            raise UserError(f"port {given} is in use; unset MASTER_PORT, or give a free one") from None
        return int(probe.getsockname()[1])


def launch(folder: RunFolder, *, ranks: int, port: int) -> Status:
    """Run `uft_ds.train` on `ranks` processes until they end; the folder is prepared and locked by the caller.

    The launcher's own output goes to launcher.log: it hides exit codes and prints tracebacks for all of them.
    """
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node", str(ranks)),
        *("--master-addr", "127.0.0.1", "--master-port", str(port), "--max-restarts", "0"),
        *("-m", "uft_ds.train", str(folder.recipe), "--prepared"),
    ]
    with folder.launcher_log.open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            command, stderr=log, env=rank_environment(ranks), start_new_session=True, preexec_fn=_die_with_parent
        )
        try:
            process.wait()
        except KeyboardInterrupt:
            _stop(process)
            return Status(EXIT_INTERRUPTED, "interrupted")
    status = folder.read_status()
    return status or Status(EXIT_CRASHED, _last_words(folder, ranks))


def rank_environment(ranks: int) -> dict[str, str]:
    """What the ranks inherit, with defaults for whatever the user has not set."""
    defaults = {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks)),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }
    if not torch.cuda.is_available():
        defaults["DS_ACCELERATOR"] = "cpu"
    return defaults | dict(os.environ)


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


def _die_with_parent() -> None:
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _last_words(folder: RunFolder, ranks: int) -> str:
    """Where to look after a crash: the last line of the rank that raised."""
    for rank in range(ranks):
        log = folder.log(rank)
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
        if any(line.startswith("Traceback") for line in lines):
            return f"rank {rank} crashed: {lines[-1].strip()} (traceback in {log})"
    return f"the ranks ended without a word; see {folder.launcher_log} and the logs beside it"
