"""The list of a checkpoint's files with their sizes and SHA-256: a checkpoint counts only with a valid one.

A flipped bit passes both `torch.load` and safetensors without a word; the manifest is what finds it.
"""

from __future__ import annotations

import json
from pathlib import Path

from uft_ds.files import sha256, write_atomically

MANIFEST = "manifest.json"


def write_manifest(folder: Path) -> None:
    """Record every file below `folder`; the last thing that is written there."""
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    write_atomically(folder / MANIFEST, json.dumps({"files": files}, indent=2) + "\n")


def manifest_problem(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        recorded = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except OSError:
        return f"{folder / MANIFEST}: missing; the checkpoint was never finished"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{folder / MANIFEST}: not a manifest"
    for name, (num_bytes, digest) in recorded.items():
        path = folder / name
        if not path.is_file():
            return f"{path}: missing"
        if path.stat().st_size != num_bytes:
            return f"{path}: {path.stat().st_size} bytes, {num_bytes} recorded"
        if sha256(path) != digest:
            return f"{path}: its content is not what was written"
    return None
