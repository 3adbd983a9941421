"""lm-evaluation-harness itself: whether it is there, in which version, and how much it says."""

from __future__ import annotations

import importlib.util
import logging
import os
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from uft_ds.errors import UserError
from uft_ds.host.packages import install_command

NAME = "lm_eval"
_VERSIONS_OF = ("lm_eval", "transformers", "torch")


def check_is_there() -> None:
    """Refuse an environment without lm-evaluation-harness, before anything is loaded.

    Raises:
        UserError: names the extra that brings it.
    """
    if importlib.util.find_spec(NAME) is None:
        raise UserError(
            f"lm-evaluation-harness is not installed; the extra uft_ds[eval] brings it: {install_command('eval')}"
        )


def root() -> Path:
    """The folder of the package, found without importing it."""
    spec = importlib.util.find_spec(NAME)
    assert spec is not None, "check_is_there comes first"
    assert spec.origin is not None
    return Path(spec.origin).parent


def read_task_file(path: Path) -> dict[str, Any]:
    """A task file as it stands, without what it includes and the functions that it names."""
    found = yaml.load(path.read_text(encoding="utf-8"), _WithoutFunctions)
    return found if isinstance(found, dict) else {}


def versions() -> dict[str, str]:
    """Versions of the packages that numbers may change with."""
    return {name: metadata.version(name) for name in _VERSIONS_OF}


def quiet() -> None:
    """Silence the progress bars and notes of lm-evaluation-harness and datasets; `uft eval` shows its own.

    Call it before either is imported: tqdm reads the environment once.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger(NAME).setLevel(logging.ERROR)


class _WithoutFunctions(yaml.SafeLoader):
    """Reads task files without the functions that they name."""


_WithoutFunctions.add_multi_constructor("!", lambda loader, suffix, node: None)
