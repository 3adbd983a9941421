"""The weights of a base as a run computes with them: as they are stored, or those of linear layers rounded to NF4."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from uft_ds.errors import UserError
from uft_ds.streams.load import check_base_files
from uft_ds.streams.nf4 import NF4, Nf4Base, check_bitsandbytes, check_can_be_nf4, rounded
from uft_ds.streams.stored_names import origins
from uft_ds.streams.weight_files import WeightFiles


def base_weights(folder: Path, nf4: Nf4Base | None) -> WeightFiles:
    """The weight files of a base. Of one in NF4, `read` returns the very values that were trained on.

    Raises:
        UserError: bitsandbytes is missing, or the files are not of a base that can be in NF4.
    """
    if nf4 is None:
        return WeightFiles(folder)
    check_bitsandbytes()
    model, empty = check_base_files(folder)
    names = stored_in_nf4(folder, model, empty, check_can_be_nf4(model))
    return WeightFiles(folder, dict.fromkeys(names, partial(rounded, base=nf4)))


def stored_in_nf4(folder: Path, model: Any, empty: Mapping[str, Tensor], names: Iterable[str]) -> list[str]:
    """The names under which the files hold the weights that NF4 takes.

    Args:
        model: on the meta device. empty: stored tensors by their names in the files, on the meta device.
        names: in memory, as `check_can_be_nf4` returns them.
    Raises:
        UserError: one of them is stored in several tensors, so that a merged model could not be written.
    """
    found = origins(model, empty)
    stored = []
    for name in names:
        origin = found.get(name)
        if origin is None or not origin.is_one_tensor:
            parts = "nothing of that name" if origin is None else f"{origin.names[0]} (of {len(origin.names)})"
            raise UserError(
                f"model.quantization: {NF4} given, but {folder} holds {name} as {parts}, which transformers converts "
                "when it loads it, so no merged model could be written: leave it out, or take another model"
            )
        stored.append(origin.names[0])
    return stored
