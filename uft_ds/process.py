"""What a process tells its surroundings before it starts to work."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

import torch


def choose_accelerator() -> None:
    """Tell DeepSpeed, before it is first imported, that there is no GPU: left to find out, it warns of it."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def die_with_parent() -> None:
    """Linux: be killed when the parent dies, so that no orphan writes beside a restart."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
