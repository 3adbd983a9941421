"""Write and verify safetensors files; file-system errors are raised as OSError, not as SafetensorError."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from uft_ds.errors import CheckFailed


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write one safetensors file.

    Raises:
        OSError: the file cannot be written; names it.
    """
    try:
        save_file(dict(tensors), path, metadata=metadata)
    except SafetensorError as error:  # safetensors wraps the errors of the operating system
        raise OSError(f"{path}: {error}") from None
    path.chmod(0o644)  # safetensors writes 0600 whatever the umask


def check_same(path: Path, written: Mapping[str, Tensor]) -> None:
    """Read a file back and compare it bit for bit with the tensors in memory.

    Raises:
        CheckFailed: a tensor is missing, empty, not finite or differs from what was written.
    """
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        if names != set(written):
            raise CheckFailed(f"{path}: {len(names)} tensors read back, {len(written)} written")
        for name, tensor in written.items():
            read = file.get_tensor(name)
            if read.numel() == 0 or not torch.equal(read, tensor) or not torch.isfinite(read).all():
                raise CheckFailed(f"{path}: {name} is empty, not finite, or not what was written")
