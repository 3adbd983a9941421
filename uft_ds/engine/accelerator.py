"""Choose the kind of device that DeepSpeed uses, and import DeepSpeed."""

from __future__ import annotations

import os


def choose_accelerator() -> None:
    """Tell DeepSpeed, before its first import, that there is no GPU. Otherwise it searches for one and warns."""
    import torch  # imported here, because processes that only tokenise do not need it

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def import_deepspeed() -> None:
    """Import what a rank uses of DeepSpeed: most of it is imported by functions, when they are first called."""
    choose_accelerator()
    import deepspeed.module_inject.auto_ep_layer
    import deepspeed.ops
    import deepspeed.runtime.superoffload.superoffload_stage3
    import deepspeed.runtime.zero.muon.muon_optimizer  # every ZeRO optimiser imports it

    # On a CPU this op would be compiled at the first start, although only inference uses it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
