"""What tests need of a machine beyond the package itself: it is there, or the test is skipped with the remedy.

Under `UFT_TEST_STRICT=1` a skip is a failure (strict.py). Every skip of the suite starts in this file.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import pytest

from uft_ds.examples.smollm2 import NAME, default_cache_dir, is_complete

DEV = "pip install '.[dev]' brings it"


def missing(what: str, remedy: str, output: str = "") -> NoReturn:
    """Skip the test, or the module that is being imported.

    Args:
        output: of the program that did not get it; its last line is shown.
    """
    said = f" ({output.strip().splitlines()[-1]})" if output.strip() else ""
    pytest.skip(f"no {what}{said}; {remedy}", allow_module_level=True)


def package(module: str, remedy: str = DEV) -> ModuleType:
    """An importable module of an optional package."""
    installed(module.partition(".")[0], remedy)
    return importlib.import_module(module)


def installed(name: str, remedy: str = DEV) -> None:
    """A package that another process will import."""
    if importlib.util.find_spec(name) is None:
        missing(f"package {name}", remedy)


def program(name: str, remedy: str) -> None:
    """A command on the path."""
    if shutil.which(name) is None:
        missing(f"command {name}", remedy)


def real_data() -> Path:
    """The folder of real data: UFT_TEST_DATA, by default beside the project."""
    folder = Path(os.environ.get("UFT_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        missing(f"real data at {folder}", "set UFT_TEST_DATA to its folder")
    return folder


def smollm2() -> Path:
    """The folder of the quickstart's model, which is never downloaded here: 93 MB are no surprise for a fast test."""
    folder = default_cache_dir() / NAME
    if not is_complete(folder):
        missing(f"{NAME} in {folder}", "`make fetch` and `uft quickstart` put it there")
    return folder


@contextmanager
def tmpfs(folder: Path, size: str) -> Iterator[Path]:
    """A file system of its own at `folder`, such as "4m" large, for the time of a block."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        missing(f"tmpfs at {folder}", "only root may mount one", mounted.stderr)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)
