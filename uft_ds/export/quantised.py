"""Which adapters belong on a base in NF4: a run's settings say it, and a file in the folder of an adapter.

PEFT's adapter_config.json has no field for it, and on the same base in 16 bits the adapter is another model.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from uft_ds.checkpoint.folder import run_of_adapter
from uft_ds.errors import UserError
from uft_ds.recipe.settings import ModelSettings
from uft_ds.recipe.to_settings import load_settings
from uft_ds.streams.nf4 import MARK, NF4, Nf4Base

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def nf4_of(model: ModelSettings) -> Nf4Base | None:
    """The base of a run in NF4; None if it is not quantised."""
    return Nf4Base(getattr(torch, model.dtype)) if model.quantization == NF4 else None


def write_mark(folder: Path, nf4: Nf4Base) -> None:
    """Note in an adapter's folder that it belongs on its base in NF4."""
    (folder / MARK).write_bytes(nf4.mark)


def nf4_of_adapter(folder: Path) -> Nf4Base | None:
    """The base in NF4 that an adapter was trained on; None if its base is not quantised, as far as is known.

    Raises:
        UserError: what the folder says cannot be read.
    """
    path = folder / MARK
    if path.is_file():
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["quantization"] != NF4:
                raise ValueError
            return Nf4Base(_DTYPES[content["dtype"]])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            expected = json.dumps({"quantization": NF4, "dtype": "bfloat16"})
            raise UserError(f"{path}: cannot be read; expected {expected}, with the type of the run's model") from None
    run = run_of_adapter(folder)
    return None if run is None or not run.recipe.exists() else nf4_of(load_settings(str(run.recipe)).model)
