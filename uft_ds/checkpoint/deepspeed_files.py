"""Adapters in DeepSpeed's own checkpoints, which `engine.save_checkpoint` has written: read without running any code.

TAG/mp_rank_00_model_states.pt, zero_pp_rank_R_mp_rank_00_model_states.pt      names and shapes
TAG/[bf16_]zero_pp_rank_R_mp_rank_00_optim_states.pt                           float32 master weights, in shards
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from uft_ds.errors import UserError

_RANK = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")


def is_deepspeed(folder: Path) -> bool:
    """Whether it looks like a folder of DeepSpeed's, or one of its checkpoints."""
    return any(folder.glob("*_optim_states.pt")) or any(folder.glob("*/*_optim_states.pt"))


def find_tag(folder: Path) -> Path:
    """The folder of one checkpoint: the given one, or the one that `latest` names.

    Raises:
        UserError: there is none, or several and no `latest`.
    """
    if any(_RANK.fullmatch(path.name) for path in folder.glob("*.pt")):
        return folder
    tags = sorted(path.parent for path in folder.glob("*/*_optim_states.pt"))
    tags = sorted(set(tags))
    latest = folder / "latest"
    if latest.is_file():
        name = latest.read_text(encoding="utf-8").strip()
        named = folder / name
        if named in tags:
            return named
        raise UserError(
            f"{latest}: names {name!r}, where no checkpoint is; there are {', '.join(t.name for t in tags) or 'none'}: "
            "give one of them"
        )
    if len(tags) == 1:
        return tags[0]
    if tags:
        raise UserError(f"{folder}: has no `latest`; give one of {', '.join(str(tag) for tag in tags)}")
    raise UserError(f"{folder}: holds no DeepSpeed checkpoint (no *_optim_states.pt)")


def read_trainable(folder: Path) -> dict[str, Tensor]:
    """The float32 master weights of all trainable parameters, whole, by name.

    Raises:
        UserError: a file is missing or damaged, or holds more than tensors; names it.
    """
    tag = find_tag(folder)
    shards = _shards(tag)
    states = {rank: _load(path)["optimizer_state_dict"] for rank, path in shards.items()}
    stage = int(states[0]["zero_stage"]) if "zero_stage" in states[0] else 0
    shapes = _shapes(tag)
    if stage == 3:
        flats = {rank: state["fp32_flat_groups"] for rank, state in states.items()}
        return _from_stage_3(tag, shapes, flats)
    if stage in (1, 2):
        key = "single_partition_of_fp32_groups"
        flats = {rank: state[key] for rank, state in states.items()}
        return _from_stage_2(tag, shapes, flats)
    raise UserError(f"{tag}: zero_stage is {stage}, expected 1, 2 or 3")


def _shards(tag: Path) -> dict[int, Path]:
    found: dict[int, Path] = {}
    for path in tag.glob("*_optim_states.pt"):
        match = _RANK.fullmatch(path.name)
        if match is None or match[2] != "00":
            raise UserError(f"{path}: of a model-parallel run, which cannot be converted")
        found[int(match[1])] = path
    missing = sorted(set(range(max(found, default=0) + 1)) - set(found))
    if missing:
        raise UserError(f"{tag}: the optimiser's state of rank {missing[0]} is missing, there is one of {max(found)}")
    return found


def _shapes(tag: Path) -> list[dict[str, tuple[int, ...]]]:
    """Names and shapes of the trainable parameters, a mapping for each group of the optimiser."""
    paths = sorted(tag.glob("*mp_rank_00_model_states.pt"))
    if not paths:
        raise UserError(f"{tag}: holds no *_model_states.pt, which names the parameters")
    content = _load(paths[0])
    groups = content.get("param_shapes")
    if not groups:
        raise UserError(f"{paths[0]}: names no parameters (param_shapes)")
    groups = groups if isinstance(groups, list) else [groups]
    return [{name: tuple(shape) for name, shape in group.items()} for group in groups]


def _from_stage_3(
    tag: Path, groups: list[dict[str, tuple[int, ...]]], flats: Mapping[int, list[Tensor]]
) -> dict[str, Tensor]:
    """Each parameter is padded and cut into as many pieces as ranks; a rank's pieces follow one another."""
    world = len(flats)
    streams = [torch.cat([flat.reshape(-1) for flat in flats[rank]]) for rank in range(world)]
    found: dict[str, Tensor] = {}
    at = 0
    for name, shape in ((n, s) for group in groups for n, s in group.items()):
        numel = _numel(shape)
        piece = -(-numel // world)
        if any(at + piece > len(stream) for stream in streams):
            raise UserError(f"{tag}: {name}: the ranks' files end before it")
        whole = torch.cat([stream[at : at + piece] for stream in streams])[:numel]
        found[name] = whole.reshape(shape).clone()
        at += piece
    return found


def _from_stage_2(
    tag: Path, groups: list[dict[str, tuple[int, ...]]], flats: Mapping[int, list[Tensor]]
) -> dict[str, Tensor]:
    """The parameters of a group follow one another; ranks hold consecutive runs of that."""
    found: dict[str, Tensor] = {}
    for number, group in enumerate(groups):
        stream = torch.cat([flats[rank][number].reshape(-1) for rank in range(len(flats))])
        at = 0
        for name, shape in group.items():
            numel = _numel(shape)
            if at + numel > len(stream):
                raise UserError(f"{tag}: {name}: the ranks' files end before it")
            found[name] = stream[at : at + numel].reshape(shape).clone()
            at += numel
    return found


def _numel(shape: tuple[int, ...]) -> int:
    numel = 1
    for size in shape:
        numel *= int(size)
    return numel


def _load(path: Path) -> dict[str, Any]:
    """A file of tensors, plain values and three of DeepSpeed's classes; anything else in it is refused, not run."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    try:
        with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
            content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        reason = next((line for line in str(error).splitlines() if "GLOBAL" in line or "global" in line), str(error))
        raise UserError(f"{path}: refused: it holds more than tensors ({reason.strip()[:200]})") from None
    except Exception as error:  # noqa: BLE001 - damaged files raise many types
        raise UserError(f"{path}: damaged ({type(error).__name__}: {str(error).splitlines()[0][:120]})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, expected a dictionary")
    return content
