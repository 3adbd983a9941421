"""Which kind of device DeepSpeed is told to use."""

from __future__ import annotations

import os


def choose_accelerator() -> None:
    """Tell DeepSpeed, before it is first imported, that there is no GPU: left to find out, it warns of it."""
    import torch  # here, for processes that only tokenise need it not

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
