"""The programs that start ranks, and whether they would start them with this Python."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from uft_ds.doctor.finding import Finding
from uft_ds.doctor.tools import output_of

MODULES = {"torchrun": "torch.distributed.run", "deepspeed": "deepspeed.launcher.runner"}


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
        return Finding(name, "problem", f"{found} belongs to another Python than {python}", remedy)
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
    try:
        with script.open("rb") as file:
            first = file.read(1024).split(b"\n", 1)[0].decode(errors="replace")
    except OSError:
        return False
    # An environment's python is a link to the system's: what matters is the folder it is called by.
    return first.startswith("#!") and Path(first[2:].strip().split(" ")[0]).parent == Path(python).parent
