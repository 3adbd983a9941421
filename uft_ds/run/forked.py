"""Ranks forked from the `uft` command, which has imported everything that they need.

As programs of their own, torchrun and each rank import the same libraries again: four CPU seconds each, most of what
a start costs. The command therefore forks a server before it does anything else. The server computes nothing, so that
whatever it forks later begins in a clean process: without threads, without a context on a device, without locks.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess

import torch

from uft_ds.engine.accelerator import import_deepspeed
from uft_ds.errors import EXIT_CRASHED, Stopped
from uft_ds.host.process import LAUNCHED_BY, become_launcher, die_with_parent, show_as
from uft_ds.host.signals import listen
from uft_ds.run.order import SECONDS_TO_STOP, Order
from uft_ds.run.rank import main

_CUDA_NOT_INITIALIZED = 3
"""What the driver's `cuCtxGetCurrent` returns where `cuInit` has not been called."""
_FORK = multiprocessing.get_context("fork")


class RankServer:
    """The command's end of the server; the ranks of one order at a time."""

    def __init__(self, connection: Connection, process: ForkProcess) -> None:
        self._connection, self._process = connection, process

    @property
    def is_alive(self) -> bool:
        """Whether it can still start ranks. The system may have killed it, for lack of memory."""
        return self._process.is_alive()

    def start(self, order: Order) -> RankServer:
        """Fork the ranks."""
        self._tell(order)
        return self

    def poll(self, seconds: float) -> dict[int, int] | None:
        """As `LaunchedRanks`; no rank at all if the server has died."""
        try:
            codes: dict[int, int] | None = self._connection.recv() if self._connection.poll(seconds) else None
        except (EOFError, OSError):
            return {}
        return codes

    def ask_to_stop(self) -> None:
        """As `LaunchedRanks`."""
        self._tell(signal.SIGUSR1)

    def end(self) -> None:
        """As `LaunchedRanks`."""
        self._tell(signal.SIGTERM)
        self.poll(2 * SECONDS_TO_STOP)

    def close(self) -> None:
        """End the server, and what it may still run."""
        self._connection.close()
        self._process.join(2 * SECONDS_TO_STOP)
        if self._process.exitcode is None:
            self._process.kill()  # its ranks die with it
            self._process.join()

    def _tell(self, what: Order | signal.Signals) -> None:
        with suppress(OSError):  # it has died, which `poll` tells
            self._connection.send(what)


@contextmanager
def rank_server() -> Iterator[RankServer | None]:
    """A server for the time of the block; None where its ranks could not use the GPUs.

    The caller must not have computed anything yet: a fork of a process with OpenMP threads hangs in its first loop.
    """
    import_deepspeed()
    if _is_driver_in_use():
        yield None
        return
    ours, theirs = _FORK.Pipe()
    sys.stdout.flush()  # or each fork would write what is still in the buffer
    sys.stderr.flush()
    process = _FORK.Process(target=_serve, args=(theirs, ours, os.getpid()))
    process.start()
    theirs.close()
    server = RankServer(ours, process)
    try:
        yield server
    finally:
        server.close()


def _is_driver_in_use() -> bool:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:  # no GPU
        return False
    return bool(driver.cuCtxGetCurrent(ctypes.byref(ctypes.c_void_p())) != _CUDA_NOT_INITIALIZED)


def _serve(orders: Connection, commands_end: Connection, command: int) -> None:
    commands_end.close()  # a copy that stays open would hide the end of the command
    os.setsid()  # Ctrl-C in the terminal is for the command alone, which passes it on
    os.environ[LAUNCHED_BY] = str(command)
    become_launcher()
    show_as(("uft_ds", "ranks"), os.environ)
    gc.freeze()  # a collection would visit, and so copy, all that the command has imported
    with suppress(EOFError, OSError):
        while True:
            order = orders.recv()
            if isinstance(order, Order):  # else it is a signal for ranks that have ended meanwhile
                orders.send(_run(order, orders))


def _run(order: Order, orders: Connection) -> dict[int, int]:
    """Start the ranks, pass signals on, and wait for the end of all.

    Returns:
        Exit codes, without those of ranks that were ended because another one had failed, or by the command's wish.
    """
    try:
        running = _started(order)
    except OSError as error:
        with suppress(OSError), order.log.open("a", encoding="utf-8") as log:
            log.write(f"a rank cannot be forked: {error.strerror or error}\n")
        return {0: EXIT_CRASHED}
    codes: dict[int, int] = {}
    is_listening, deadline = True, None
    while running:
        waited_for: list[Connection | int] = [process.sentinel for process in running.values()]
        if is_listening:
            waited_for.append(orders)
        ready = wait(waited_for, None if deadline is None else max(0.0, deadline - time.monotonic()))
        asked = None
        if orders in ready:
            try:
                asked = orders.recv()
            except (EOFError, OSError):  # the command has left without waiting for its ranks
                is_listening, asked = False, signal.SIGTERM
        ended = {rank: process.exitcode for rank, process in running.items() if process.exitcode is not None}
        running = {rank: process for rank, process in running.items() if rank not in ended}
        if asked == signal.SIGUSR1:
            _signal(running, signal.SIGUSR1)
        if deadline is None:
            codes |= ended
            if asked == signal.SIGTERM or any(ended.values()):
                _signal(running, signal.SIGTERM)
                deadline = time.monotonic() + SECONDS_TO_STOP
        elif time.monotonic() >= deadline:
            _signal(running, signal.SIGKILL)
            deadline = time.monotonic() + SECONDS_TO_STOP
    return codes


def _started(order: Order) -> dict[int, ForkProcess]:
    """The ranks of an order.

    Raises:
        OSError: the system lets no further process start; those that did start have ended.
    """
    running: dict[int, ForkProcess] = {}
    try:
        for rank in range(order.num_ranks):
            process = _FORK.Process(target=_one_rank, args=(order, rank))
            process.start()
            running[rank] = process
    except OSError:
        _signal(running, signal.SIGKILL)
        for process in running.values():
            process.join()
        raise
    return running


def _signal(running: Mapping[int, ForkProcess], number: signal.Signals) -> None:
    for process in running.values():
        # Not yet waited for, so the process id is still its own, also if it has ended.
        if process.exitcode is None and process.pid is not None:
            os.kill(process.pid, number)


def _one_rank(order: Order, rank: int) -> None:
    """The program of a rank, as `uft_ds/train.py`, in a process that has imported it."""
    die_with_parent()
    request = listen()
    log = order.log.open("a", encoding="utf-8")
    os.dup2(log.fileno(), 2)
    if "OMP_NUM_THREADS" not in os.environ:  # torch has read it, when it was imported
        torch.set_num_threads(int(order.environment["OMP_NUM_THREADS"]))
    warnings.simplefilter("default", FutureWarning)  # which the command does not show; a log has each once
    os.environ.clear()
    os.environ.update(_variables(order, rank) | order.environment)
    show_as(("uft_ds.train", *order.arguments, f"(rank {rank})"), os.environ)
    code = EXIT_CRASHED
    try:
        code = main(request, list(order.arguments))
    except Stopped as stopped:
        code = stopped.exit_code
    except BaseException:  # noqa: BLE001 - this is the end of the process
        traceback.print_exc(file=log)
    with suppress(OSError):
        for stream in (sys.stdout, sys.stderr, log):
            stream.flush()
    os._exit(code)  # the reason is in uft_ds/train.py


def _variables(order: Order, rank: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(order.num_ranks),
        "LOCAL_WORLD_SIZE": str(order.num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(order.port),
    }
