"""Write a model of which all parameters were trained, tensor by tensor, from the states that the ranks have saved.

No rank's state is ever put together: a checkpoint addresses pieces by parameter and position, so one tensor at a time
is in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from uft_ds.checkpoint.shards import Shards
from uft_ds.engine.optimizer_state import MASTER
from uft_ds.errors import CheckFailed, UserError
from uft_ds.export.merge import stored_as, write_finite
from uft_ds.streams.policy import OF_POLICY
from uft_ds.streams.weight_files import WeightFiles


@dataclass(frozen=True)
class Written:
    """What was written and read back. changed: parameters of which any stored value differs from the base's."""

    parameters: int
    changed: int

    @property
    def summary(self) -> str:
        return (
            f"all {self.parameters} parameters read back as they were trained; {self.changed} of them differ from the "
            "base's"
        )


def write_whole(
    base: WeightFiles,
    stored: Mapping[str, tuple[str, ...]],
    shards: Shards,
    folder: Path,
    *,
    dtype: torch.dtype | None,
    max_shard_bytes: int,
    on_bytes: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write the trained weights under the names that the base's files use; other tensors of these files are copied.

    Args:
        stored: for each parameter of the base the names in its files, as `stored_parameters` returns them.
        shards: of the checkpoint.
        dtype: type of all floating-point tensors; None: each keeps the base's type, which rounds the float32 masters
            to what the run forwarded.
    Raises:
        UserError: the checkpoint is of another model, a value is not finite in its type, or the disk is too full.
    """
    parameter_of = {name: parameter for parameter, names in stored.items() for name in names}
    missing = {OF_POLICY + parameter for parameter in stored} ^ set(shards.shapes)
    if missing:
        raise UserError(f"{base.folder}: {min(missing)} is either there or in the checkpoint, expected in both")
    for name, parameter in parameter_of.items():
        if base.infos[name].shape != shards.shapes[OF_POLICY + parameter]:
            raise UserError(
                f"{base.folder}: {name} has shape {list(base.infos[name].shape)}, in the checkpoint "
                f"{list(shards.shapes[OF_POLICY + parameter])}"
            )

    def read(name: str) -> Tensor:
        return trained(shards, parameter_of[name]) if name in parameter_of else base.read(name)

    infos = [stored_as(info, dtype) for info in base.infos.values()]
    write_finite(infos, read, folder, of=base.folder, max_shard_bytes=max_shard_bytes, on_bytes=on_bytes)


def trained(shards: Shards, parameter: str) -> Tensor:
    """A trained parameter: float32, in its own shape."""
    shape = shards.shapes[OF_POLICY + parameter]
    return shards.read(OF_POLICY + parameter, MASTER, 0, prod(shape)).view(shape)


def check_written(
    folder: Path,
    base: WeightFiles,
    stored: Mapping[str, tuple[str, ...]],
    shards: Shards,
    on_parameter: Callable[[int, int], None] = lambda done, total: None,
) -> Written:
    """Read a written model back, and compare it with what was trained.

    Raises:
        CheckFailed: a tensor differs, or none differs from the base.
    """
    written, changed = WeightFiles(folder), 0
    for number, (parameter, names) in enumerate(stored.items()):
        on_parameter(number, len(stored))
        expected = trained(shards, parameter)
        for name in names:
            if not torch.equal(written.read(name), expected.to(written.infos[name].dtype)):
                raise CheckFailed(f"{folder.name}: {name} is not what was trained, as it was read back; convert again")
        changed += not torch.equal(base.read(names[0]), expected.to(base.infos[names[0]].dtype))
    on_parameter(len(stored), len(stored))
    if not changed:
        raise CheckFailed(
            f"{folder.name}: every parameter is the base's in the type that it is stored in: nothing was trained, or "
            "too little to change it, which --dtype float32 keeps"
        )
    return Written(len(stored), changed)
