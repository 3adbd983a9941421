"""A base whose weight files do not hold the model is never trained: refused before the launch, then by each rank."""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from ranks import run_on_ranks
from runs import uft, write_recipe
from safetensors.torch import load_file, save_file
from torch import Tensor

from uft_ds.engine.deepspeed_file import deepspeed_config, read_deepspeed_file
from uft_ds.engine.engine import partitioned_loading
from uft_ds.errors import UserError
from uft_ds.streams.load import load_base

NAME = "model.layers.1.mlp.up_proj.weight"


def damaged(base: Path, folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> Path:
    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def messages(folders: list[Path]) -> list[str]:
    """What a rank says of each base, loaded under ZeRO-3; nothing where it is loaded."""
    found = []
    for folder in folders:
        config = deepspeed_config(read_deepspeed_file("zero3"), dtype=torch.float32, max_grad_norm=1.0)
        with partitioned_loading(config):
            try:
                load_base(
                    str(folder), revision=None, dtype=torch.float32, attention="sdpa", gradient_checkpointing=False
                )
                found.append("")
            except UserError as error:
                found.append(str(error))
    return found


def test_all_ranks_refuse_what_one_of_them_finds(tiny_qwen2: Path, tmp_path: Path) -> None:
    """Without the look at headers: a missing tensor, another shape (rank 0 alone meets it), NaN in one rank's shard.

    Afterwards the ranks load a good base: none was left in a collective.
    """
    lacking = damaged(tiny_qwen2, tmp_path / "lacking", lambda tensors: tensors.pop(NAME))
    shape = damaged(tiny_qwen2, tmp_path / "shape", lambda tensors: tensors.update({NAME: torch.ones(8, 64)}))
    first = damaged(tiny_qwen2, tmp_path / "first", lambda tensors: tensors[NAME][0, 0].fill_(float("nan")))
    last = damaged(tiny_qwen2, tmp_path / "last", lambda tensors: tensors[NAME][-1, -1].fill_(float("inf")))
    found = run_on_ranks(messages, 2, [lacking, shape, first, last, tiny_qwen2])
    assert found[0] == found[1]
    assert f"lacks {NAME}, which its config.json asks for" in found[0][0]
    assert f"size mismatch for {NAME}" in found[0][1]
    assert "ignore_mismatched_sizes" not in found[0][1]
    assert f"{NAME} holds NaN or infinity" in found[0][2]
    assert f"{NAME} holds NaN or infinity" in found[0][3]
    assert found[0][4] == ""


def test_a_damaged_base_is_refused_before_the_launch(tiny_qwen2: Path, tmp_path: Path) -> None:
    """Exit code 2, file and tensor by name, no folder of a run."""
    base = damaged(tiny_qwen2, tmp_path / "base", lambda tensors: tensors.pop(NAME))
    done = uft("train", str(write_recipe(tmp_path, base)))
    assert done.returncode == 2
    assert (
        f"error: model.base: {base / 'model.safetensors'}: lacks {NAME}, which its config.json asks for" in done.stderr
    )
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
