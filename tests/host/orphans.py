"""A parent that is killed, and its child, which asks to die with it only then: processes of test_orphans.py.

python orphans.py HOW FOLDER
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from uft_ds.host.process import LAUNCHED_BY, die_with_parent

WAIT_SECONDS = 60.0


def wait_until(is_now: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not is_now():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def child(folder: Path) -> None:
    """A process that asks to die with its parent once that one is dead."""
    (folder / "pid").write_text(str(os.getpid()))
    (folder / "pid").rename(folder / "child")
    wait_until((folder / "go").exists)
    (folder / "parent").write_text(str(os.getppid()))
    die_with_parent()
    (folder / "survived").touch()


def parent(how: str, folder: Path) -> None:
    """A process that starts a child and waits to be killed."""
    said = {"torchrun": {"TORCHELASTIC_RUN_ID": "1"}, "uft": {LAUNCHED_BY: str(os.getpid())}}.get(how, {})
    if how == "multiprocessing":
        multiprocessing.get_context("spawn").Process(target=child, args=(folder,)).start()
    else:
        subprocess.Popen([sys.executable, __file__, "child", str(folder)], env=dict(os.environ) | said)
    time.sleep(WAIT_SECONDS)


if __name__ == "__main__":
    if sys.argv[1] == "child":
        child(Path(sys.argv[2]))
    else:
        parent(sys.argv[1], Path(sys.argv[2]))
