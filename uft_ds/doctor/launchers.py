"""Check the programs that start ranks, and whether they belong to this Python environment."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from uft_ds.doctor.finding import Finding
from uft_ds.doctor.tools import output_of

MODULES = {"torchrun": "torch.distributed.run", "deepspeed": "deepspeed.launcher.runner"}
_HEAD_BYTES = 8192
"""Enough for a script's first two lines; a path in the second has at most 4096 bytes."""


def check_launcher(name: str, environ: Mapping[str, str] = os.environ, python: str = sys.executable) -> Finding:
    """Check `torchrun` or `deepspeed` for use by hand; `uft train` needs neither on the PATH."""
    module = f"{python} -m {MODULES[name]}"
    found = shutil.which(name, path=environ.get("PATH", os.defpath))
    if found is None:
        return Finding(
            name, "note", "not on the PATH; `uft train` does not need it", f"activate the environment, or {module}"
        )
    if not _starts(Path(found), python):
        remedy = f"activate this environment ({Path(python).parent}/activate), or {module}"
        return Finding(
            name, "note", f"{found} belongs to another Python than {python}; `uft train` does not need it", remedy
        )
    return Finding(name, "ok", found)


def check_slurm(
    environ: Mapping[str, str] = os.environ, ask: Callable[[Sequence[str]], str | None] = output_of
) -> Finding:
    """Check srun, which runs on several nodes need."""
    found = shutil.which("srun", path=environ.get("PATH", os.defpath))
    if found is None:
        return Finding("Slurm", "ok", "no srun; one machine needs none")
    version = ask([found, "--version"])
    if version is None:
        return Finding(
            "Slurm", "problem", f"{found} --version fails", "ask the cluster's administrators; see slurm.conf"
        )
    return Finding("Slurm", "ok", f"{version.strip()} ({found})")


def _starts(script: Path, python: str) -> bool:
    """Whether a script belongs to this Python's environment: it is in the same folder, or names its interpreter."""
    if script.parent == Path(python).parent:
        return True
    # An environment's python is a link to the system's, so compare folders of the unresolved paths.
    interpreter = _interpreter(script)
    return interpreter is not None and interpreter.parent == Path(python).parent


def _interpreter(script: Path) -> Path | None:
    """The interpreter of a script, from its first line, or from its second if the path is too long for the kernel.

    For long paths installers write `#!/bin/sh` and then `'''exec' /a/long/python "$0" "$@"`, valid in sh and Python.
    """
    try:
        with script.open("rb") as file:
            first, second, *_ = [*file.read(_HEAD_BYTES).decode(errors="replace").split("\n", 2), ""]
    except OSError:
        return None
    if not first.startswith("#!"):
        return None
    command = first[2:].split()
    if command == ["/bin/sh"] and second.startswith("'''exec' "):
        try:
            command = shlex.split(second)[1:]
        except ValueError:  # an unbalanced quote
            return None
    return Path(command[0]) if command else None
