"""The programs that start ranks, and whether they would start them with this Python."""

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
"""Two lines, the second with a path of at most 4096."""


def check_launcher(name: str, environ: Mapping[str, str] = os.environ, python: str = sys.executable) -> Finding:
    """`torchrun` or `deepspeed` by hand; `uft train` needs neither on the PATH."""
    module = f"{python} -m {MODULES[name]}"
    found = shutil.which(name, path=environ.get("PATH", os.defpath))
    if found is None:
        return Finding(
            name, "note", "not on the PATH; `uft train` does without", f"activate the environment, or {module}"
        )
    if not _starts(Path(found), python):
        remedy = f"activate this environment ({Path(python).parent}/activate), or {module}"
        return Finding(
            name, "note", f"{found} belongs to another Python than {python}; `uft train` does without", remedy
        )
    return Finding(name, "ok", found)


def check_slurm(
    environ: Mapping[str, str] = os.environ, ask: Callable[[Sequence[str]], str | None] = output_of
) -> Finding:
    """srun, for more nodes than one."""
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
    """Whether a script of an environment starts that environment's Python: it lies beside it, or names it."""
    if script.parent == Path(python).parent:
        return True
    # An environment's python is a link to the system's: what matters is the folder it is called by.
    interpreter = _interpreter(script)
    return interpreter is not None and interpreter.parent == Path(python).parent


def _interpreter(script: Path) -> Path | None:
    """What a script is run by: by its first line or, where that would be too long for the kernel, by its second.

    Installers then write `#!/bin/sh` and, for both sh and Python, `'''exec' /a/long/python "$0" "$@"`.
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
        except ValueError:  # an open quote
            return None
    return Path(command[0]) if command else None
