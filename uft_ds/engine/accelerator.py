"""Choose the kind of device that DeepSpeed uses."""

from __future__ import annotations

import os


def choose_accelerator() -> None:
    """Tell DeepSpeed, before its first import, that there is no GPU. Otherwise it searches for one and warns."""
    import torch  # imported here, because processes that only tokenise do not need it

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
