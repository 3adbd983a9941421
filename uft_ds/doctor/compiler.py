"""What is compiled, whether it can be, and what a build that was killed has left."""

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
    """Triton compiles a small C program at a kernel's first use on a GPU; on CPUs nothing is compiled."""
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
    """DeepSpeed's own compiled parts: a run needs none, whatever is there."""
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
    """A build that was killed leaves its `lock`, and whoever needs that op waits for it for ever, without a word.

    torch's FileBaton has no time-out. Whoever builds has the file open, which can be seen of this machine's processes.
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
            found = f"{lock}: no process here is building; every later build of it waits for ever"
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
        except OSError:  # ended, or another user's
            continue
        if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
            return int(descriptor.parts[-3])
    return None
