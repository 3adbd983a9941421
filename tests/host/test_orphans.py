"""A process that depends on another one dies with it, also where that one died before it could ask for it."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import needs
import orphans
import pytest
from orphans import wait_until
from suites import long_but

from uft_ds.host.process import LAUNCHED_BY

PR_SET_CHILD_SUBREAPER = 36


@pytest.mark.parametrize("how", long_but(["multiprocessing", "uft"], ["multiprocessing", "torchrun", "uft", "shell"]))
def test_a_child_whose_parent_died_first_ends(tmp_path: Path, how: str) -> None:
    """A worker of a pool, a rank of torchrun and one of `uft train`; a process of a shell has nobody to follow."""
    ours = ("TORCHELASTIC_RUN_ID", LAUNCHED_BY)
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    process = subprocess.Popen([sys.executable, orphans.__file__, how, str(tmp_path)], env=environment)
    try:
        wait_until(lambda: (tmp_path / "child").exists() or process.poll() is not None)
    finally:
        process.kill()
        process.wait()
    pid = int((tmp_path / "child").read_text())
    (tmp_path / "go").touch()
    wait_until(lambda: not Path(f"/proc/{pid}").exists())
    if how == "torchrun" and (tmp_path / "parent").read_text() != "1":
        needs.missing("init as the parent of orphans", "another process than 1 adopts them here")
    assert (tmp_path / "survived").exists() == (how == "shell")


@contextmanager
def adopting_orphans() -> Iterator[None]:
    """Within the block this process is the parent of orphans among its descendants, and learns how they end."""
    prctl = ctypes.CDLL(None).prctl
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    try:
        yield
    finally:
        prctl(PR_SET_CHILD_SUBREAPER, 0)


def test_a_rank_dies_with_its_launcher_while_it_imports() -> None:
    """Its imports take seconds; a rank that survived them would wait for a dead launcher, or meet the next one."""
    launcher = "import subprocess, sys, time; print(subprocess.Popen(sys.argv[1:]).pid, flush=True); time.sleep(600)"
    command = [sys.executable, "-c", launcher, sys.executable, "-m", "uft_ds.train", "none.yaml"]
    with adopting_orphans(), subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        rank = int(process.stdout.readline())
        wait_until(lambda: "libtorch" in Path(f"/proc/{rank}/maps").read_text())
        process.kill()
        process.wait()
        _, status = os.waitpid(rank, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL
