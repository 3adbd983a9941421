"""What a task asks, as one hash: its configuration, its questions and examples, and the files of a task of one's own.

Where things lie is no part of it, so that copied rows and a moved task file are the same task.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from uft_ds.evaluation.harness import package

_PLACES = ("dataset_path", "dataset_name", "dataset_kwargs", "include")
"""Keys of a task that say where its rows and other task files are; what lies there is in the hash."""
_FUNCTION = re.compile(r"!function\s+['\"]?([\w.]+)\.\w+")


def content_of(task: Any, shots: int, own_file: Path | None) -> str:
    """The SHA-256 of all that a task asks, hex.

    Args:
        task: of the harness, with its rows.
        shots: examples in each prompt; with 0, rows for examples do not count.
        own_file: the task file that was asked for; None for a task of the harness, whose version is recorded.
    """
    config = _without_places(task.dump_config())
    metadata = config.get("metadata")
    if isinstance(metadata, Mapping):
        config["metadata"] = {key: value for key, value in metadata.items() if key != "config_source"}
    digest = hashlib.sha256(_text(config))
    for path in () if own_file is None else _files_of(own_file, set()):
        is_module = path.suffix == ".py"
        digest.update(path.read_bytes() if is_module else _text(_without_places(package.read_task_file(path))))
    for rows in (task.eval_docs, task.sampler.df if shots and hasattr(task, "sampler") else ()):
        digest.update(b"\0rows\0")
        for row in rows:
            digest.update(_text(row) + b"\n")
    return digest.hexdigest()


def _files_of(path: Path, seen: set[Path]) -> Iterator[Path]:
    """A task file, those that it includes, and the modules of its functions beside it."""
    path = path.expanduser().resolve()
    if path in seen or not path.is_file() or path.is_relative_to(package.root().resolve()):
        return
    seen.add(path)
    yield path
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return
    for module in _FUNCTION.findall(text):
        yield from _files_of(path.parent / f"{module.replace('.', '/')}.py", seen)
    included = package.read_task_file(path).get("include", ())
    for name in [included] if isinstance(included, str) else included:
        yield from _files_of(path.parent / str(name), seen)


def _without_places(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in tree.items() if key not in _PLACES}


def _text(value: Any) -> bytes:
    return json.dumps(_plain(value), sort_keys=True).encode("utf-8", "surrogatepass")


def _plain(value: Any) -> Any:
    """As JSON has it; a function is its source, and no text holds a place in memory."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, Sequence | set | frozenset):
        parts = [_plain(one) for one in value]
        return parts if isinstance(value, Sequence) else sorted(parts, key=str)
    if isinstance(value, partial):
        return _plain([value.func, value.args, value.keywords])
    try:
        return inspect.getsource(value)
    except (TypeError, OSError):
        text = str(value)
        return type(value).__qualname__ if " at 0x" in text else text
