"""A checkpoint's files with made-up contents, for what does not look into them."""

from __future__ import annotations

from pathlib import Path

from uft_ds.checkpoint.manifest import MANIFEST, Written, write_manifest
from uft_ds.host.files import sha256


def files_below(folder: Path) -> dict[str, Written]:
    """Every file of a folder but a manifest."""
    return {
        str(path.relative_to(folder)): Written(path.stat().st_size, sha256(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }


def whole_checkpoint(folder: Path) -> Path:
    """As two ranks write it."""
    for name in (
        "adapter/adapter_model.safetensors", "adapter/adapter_config.json", "trainer.json",
        "optimizer/rank-00000-of-00002.safetensors", "optimizer/rank-00001-of-00002.safetensors",
    ):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{name}\n")
    write_manifest(folder, files_below(folder))
    return folder
