"""Read an adapter's tensors by the names that PEFT saves, from the files and names that others write as well.

base_model.model.MODULE.lora_A.weight            as PEFT saves them
base_model.model.MODULE.lora_A.default.weight    a model's own names, with the adapter's
MODULE.lora_A.weight                             without PEFT's prefix; PEFT would load none of them, silently
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from uft_ds.errors import UserError
from uft_ds.streams.lora_config import LORA_TENSOR, read_lora_config
from uft_ds.streams.pickled import unpickled

PREFIX = "base_model.model."
HEAD_TENSOR = f"{PREFIX}score.weight"
"""The head of a reward model, which PEFT saves and loads with an adapter by `modules_to_save`."""
CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter's config and its weights."""
    return (folder / CONFIG).is_file() and any((folder / name).is_file() for name in (WEIGHTS, PICKLED))


def adapter_file(folder: Path) -> Path:
    """The file of an adapter's tensors; safetensors if there are both.

    Raises:
        UserError: there is none.
    """
    for name in (WEIGHTS, PICKLED):
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{folder / WEIGHTS}: no such file; expected an adapter in PEFT's format ({WEIGHTS} or {PICKLED})")


def read_adapter_tensors(folder: Path) -> dict[str, Tensor]:
    """An adapter's tensors by the names that PEFT saves. Names that are not a LoRA's are left as they are.

    Raises:
        UserError: the file cannot be read, holds other objects than tensors, or two tensors get one name.
    """
    path = adapter_file(folder)
    if path.suffix == ".bin":
        stored = unpickled(path, torch.device("cpu"), key="")
    else:
        try:
            stored = load_file(path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: cannot be read ({error}); expected a LoRA's tensors in safetensors") from None
    tensors: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        saved = as_peft_saves(name)
        if saved in tensors:
            raise UserError(f"{path}: {name}: holds this tensor twice, under another name too; remove one of them")
        tensors[saved] = tensor
    return tensors


def written_as_peft_saves(folder: Path, into: Path) -> Path:
    """The folder itself if PEFT can load what it holds, else `into`, to which config and tensors have been written.

    Raises:
        UserError: config or tensors cannot be read.
    """
    config = read_lora_config(folder / CONFIG)
    given = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    if not set(given) - set(config) and _has_names_of_peft(adapter_file(folder)):
        return folder
    tensors = read_adapter_tensors(folder)
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, into / WEIGHTS)
    known = {key: value for key, value in given.items() if key in config}
    (into / CONFIG).write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
    return into


def _has_names_of_peft(path: Path) -> bool:
    if path.name != WEIGHTS:
        return False
    try:
        with safe_open(path, framework="pt") as file:
            return all(name == as_peft_saves(name) for name in file.keys())  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError):
        return False  # reading its tensors says why


def as_peft_saves(name: str) -> str:
    """The name under which PEFT saves a LoRA's tensor; a name that is not a LoRA's is left as it is."""
    match = LORA_TENSOR.fullmatch(name)
    if match is None:
        return name
    # The PEFT model may be a submodule of another one: what comes before PEFT's own prefix belongs to that.
    return f"{PREFIX}{match['module'].rpartition(PREFIX)[2]}.lora_{match['side']}.weight"
