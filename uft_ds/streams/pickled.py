"""Read tensors from pickled files without ever running the code that a pickle may hold."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from zipfile import is_zipfile

import torch
from torch import Tensor

from uft_ds.errors import UserError


def unpickled(path: Path, device: torch.device, *, key: str = "model.base: ") -> Mapping[str, Tensor]:
    """The tensors of a pickled file by name. Code in the file is never run.

    Args:
        key: what messages begin with, the recipe's key or nothing.
    Raises:
        UserError: the file is damaged, or holds other objects than tensors.
    """
    can_map = device.type == "cpu" and is_zipfile(path)  # before torch 1.6, files were not zip archives
    try:
        content = torch.load(path, map_location=device, weights_only=True, mmap=can_map)
    except UnpicklingError:
        raise UserError(
            f"{key}{path}: cannot be read: it is damaged, or holds other objects than tensors, which are never "
            "loaded; expected a file that torch.load(weights_only=True) can read, or safetensors"
        ) from None
    except (OSError, RuntimeError, EOFError, KeyError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{key}{path}: cannot be read, it is cut or damaged ({reason}); fetch or copy it again"
        ) from None
    if not isinstance(content, dict) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise UserError(f"{key}{path}: expected a dictionary of tensors by name, found other values")
    return content
