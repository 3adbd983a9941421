"""Check the C compiler, DeepSpeed's compiled ops, and lock files that killed builds have left."""

from __future__ import annotations

import os
import shlex
import shutil
import sysconfig
from collections.abc import Mapping
from pathlib import Path

from uft_ds.doctor.finding import Finding
from uft_ds.engine.accelerator import choose_accelerator

_DEEPEST = 3  # EXTENSIONS/py311_cu128/OP/lock


def check_compiler(has_gpus: bool, environ: Mapping[str, str] = os.environ) -> Finding:
    """Check for a C compiler: Triton compiles a small C program at a kernel's first use on a GPU, none on CPUs."""
    found = next(
        (path for name in (environ.get("CC"), "gcc", "clang", "cc") if name and (path := _which(name, environ))), None
    )
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not has_gpus:
        return Finding("C compiler", "ok", f"{found or 'none'}; none is needed on CPUs")
    if found is None:
        return Finding(
            "C compiler", "problem", "none; Triton's kernels need one", "install gcc, or set CC to a compiler"
        )
    if not header.is_file():
        remedy = "install Python's headers (python3-dev or python3-devel)"
        return Finding("C compiler", "problem", f"{found}, but no {header}; Triton's kernels need it", remedy)
    return Finding("C compiler", "ok", found)


def check_ops(installed: Mapping[str, bool] | None = None) -> Finding:
    """List DeepSpeed's pre-built ops; a run needs none of them."""
    if installed is None:
        choose_accelerator()
        from deepspeed.git_version_info import installed_ops

        installed = installed_ops
    assert installed is not None
    built = sorted(name for name, is_built in installed.items() if is_built)
    return Finding(
        "DeepSpeed ops",
        "ok",
        f"pre-built: {', '.join(built) or 'none'}; none is needed",
    )


def check_build_locks(environ: Mapping[str, str] = os.environ, processes: Path = Path("/proc")) -> list[Finding]:
    """Find `lock` files of killed builds: a process that needs such an op waits forever and silently.

    torch's FileBaton has no time-out. A process that is building has the file open, which /proc shows for this machine.
    """
    folder = _extensions(environ)
    locks = [path for depth in range(1, _DEEPEST + 1) for path in sorted(folder.glob("*/" * (depth - 1) + "lock"))]
    if not locks:
        return [Finding("build locks", "ok", f"none in {folder}")]
    findings = []
    for lock in locks:
        holder = _process_with(lock, processes)
        if holder is not None:
            findings.append(Finding("build locks", "note", f"{lock}: process {holder} is building", "wait for it"))
        else:
            found = f"{lock}: no process here is building; every later build of it waits forever"
            findings.append(Finding("build locks", "problem", found, f"rm {shlex.quote(str(lock))}"))
    return findings


def _which(command: str, environ: Mapping[str, str]) -> str | None:
    try:
        program = shlex.split(command)[0]  # CC may hold options
    except (ValueError, IndexError):
        return None
    return shutil.which(program, path=environ.get("PATH", os.defpath))


def _extensions(environ: Mapping[str, str]) -> Path:
    given = environ.get("TORCH_EXTENSIONS_DIR")
    if given:
        return Path(given)
    cache = environ.get("XDG_CACHE_HOME") or Path(environ.get("HOME", "/")) / ".cache"
    return Path(cache) / "torch_extensions"


def _process_with(path: Path, processes: Path) -> int | None:
    try:
        wanted = path.stat()
    except OSError:
        return None
    for descriptor in processes.glob("[0-9]*/fd/*"):
        try:
            found = descriptor.stat()
        except OSError:  # the process has ended, or belongs to another user
            continue
        if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
            return int(descriptor.parts[-3])
    return None
