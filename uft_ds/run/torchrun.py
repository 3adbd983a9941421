"""Ranks started by torchrun, each a program of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from contextlib import suppress

import psutil

from uft_ds.host.process import become_launcher
from uft_ds.run.order import SECONDS_TO_STOP, Order

RANK_MODULE = "uft_ds.train"


class TorchrunRanks:
    """The ranks of one order. torchrun's own output goes to the order's log: it prints a traceback for each failure."""

    def __init__(self, order: Order) -> None:
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node", str(order.num_ranks)),
            *("--master-addr", "127.0.0.1", "--master-port", str(order.port), "--max-restarts", "0"),
            *("-m", RANK_MODULE, *order.arguments),
        ]
        self._log = order.log
        with order.log.open("w", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                command, stderr=log, env=order.environment, start_new_session=True, preexec_fn=become_launcher
            )

    def poll(self, seconds: float) -> dict[int, int] | None:
        """As `LaunchedRanks`. torchrun replaces exit codes by its own 1, so they are read from its log."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        log = self._log.read_text(encoding="utf-8", errors="replace")
        found = re.findall(r"failed \(exitcode: (-?\d+)\) local_rank: (\d+)", log)
        return {int(rank): int(code) for code, rank in found}

    def ask_to_stop(self) -> None:
        """As `LaunchedRanks`."""
        with suppress(psutil.Error):
            for child in psutil.Process(self._process.pid).children(recursive=True):
                with suppress(psutil.Error):
                    if RANK_MODULE in child.cmdline():
                        child.send_signal(signal.SIGUSR1)

    def end(self) -> None:
        """As `LaunchedRanks`."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self._process.pid, number)
                self._process.wait(timeout=SECONDS_TO_STOP)
                return
            except ProcessLookupError:
                return
            except subprocess.TimeoutExpired:
                continue
