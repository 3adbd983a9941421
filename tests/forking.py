"""Processes forked from a server that has imported what they need, as `uft train` forks its ranks.

A command of its own imports torch, transformers, peft and DeepSpeed first: four CPU seconds, most of what a test of it
costs, and a rank took as long. What is forked is a process as any other, with a folder, an environment, standard
streams, signals and an exit code of its own.
"""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
import weakref
from collections.abc import Mapping
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from unittest.mock import patch

from uft_ds.host.process import show_as

BEFORE_TORCH = {"TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}
"""Read when torch is imported, so the server must have them by then: what `uft` and its ranks set, and the one thread
that tests give to each program. With two threads sums have other bits than those of a program of its own."""


def forking() -> ForkServerContext:
    """Starts processes by the server, which it starts first if need be."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["preloading"])
    # Until Python 3.12 the server does not get this process's path.
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    with patch.dict(os.environ, BEFORE_TORCH | {"PYTHONPATH": path}):
        forkserver.ensure_running()
    return context


class Program:
    """`python -m MODULE ARGUMENTS`, running; used as a `subprocess.Popen` whose outputs are files.

    It leads a process group of its own.
    """

    def __init__(self, module: str, *arguments: str, cwd: Path | None = None, env: Mapping[str, str]) -> None:
        folder = tempfile.mkdtemp()
        weakref.finalize(self, shutil.rmtree, folder)
        self._outputs = [Path(folder) / name for name in ("out", "err")]
        for path in self._outputs:
            path.touch()
        self._process = forking().Process(
            target=_run, args=(module, arguments, cwd or Path.cwd(), dict(env), self._outputs)
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """As `Popen.poll()` would find it; negative after a signal."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code.

        Raises:
            TimeoutExpired: it still runs.
        """
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout or 0.0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """(standard output, standard error), once it has ended; as `wait`."""
        self.wait(timeout)
        return self.said()

    def said(self) -> tuple[str, str]:
        """(standard output, standard error) so far."""
        out, err = (path.read_text(encoding="utf-8") for path in self._outputs)
        return out, err

    def send_signal(self, number: int) -> None:
        """To the program alone; nothing if it has ended."""
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill_group(self) -> None:
        """SIGKILL for it and all that it has started in its group; returns when it is gone."""
        if self.returncode is None:
            try:
                os.killpg(self.pid, signal.SIGKILL)
            except ProcessLookupError:  # it has no group yet
                self._process.kill()
            self._process.join()


def _run(module: str, arguments: tuple[str, ...], cwd: Path, env: dict[str, str], outputs: list[Path]) -> None:
    """In the forked process: become what the interpreter would be after `python -m`."""
    gc.freeze()  # a collection would visit, and so copy, all that the server has imported
    os.setsid()
    os.chdir(cwd)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    os.environ.clear()
    os.environ.update(env)
    show_as((sys.executable, "-m", module, *arguments), os.environ)
    for number, path in enumerate(outputs, 1):
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.path[:0] = [str(cwd), *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]
    sys.argv = [module, *arguments]
    code = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code is not None and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 - as the interpreter does at the top
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
