"""Read adapters from DeepSpeed's own checkpoints (`engine.save_checkpoint`) without running any code in them.

TAG/mp_rank_00_model_states.pt, zero_pp_rank_R_mp_rank_00_model_states.pt      names and shapes
TAG/[bf16_]zero_pp_rank_R_mp_rank_00_optim_states.pt                           float32 master weights, in shards
"""

from __future__ import annotations

import math
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from uft_ds.errors import UserError
from uft_ds.host.terminal import in_one_line

_RANK = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")


def is_deepspeed(folder: Path) -> bool:
    """Whether the folder looks like one that DeepSpeed wrote, or like one of its checkpoints."""
    return any(folder.glob("*_optim_states.pt")) or any(folder.glob("*/*_optim_states.pt"))


def find_tag(folder: Path) -> Path:
    """The folder of one checkpoint: the given one, or the one that `latest` names.

    Raises:
        UserError: there is no checkpoint, or there are several and no `latest`.
    """
    if any(_RANK.fullmatch(path.name) for path in folder.glob("*.pt")):
        return folder
    tags = sorted(path.parent for path in folder.glob("*/*_optim_states.pt"))
    tags = sorted(set(tags))
    latest = folder / "latest"
    if latest.is_file():
        name = latest.read_text(encoding="utf-8", errors="replace").strip()
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
    """The complete float32 master weights of all trainable parameters, by name.

    Raises:
        UserError: a file is missing, left over or damaged, or holds more than tensors; names it.
    """
    tag = find_tag(folder)
    paths = _shards(tag)
    shards = {rank: _shard(path) for rank, path in paths.items()}
    _check_complete(tag, paths, shards)
    groups = _shapes(tag)
    if shards[0].stage == 3:
        return _from_stage_3(tag, groups, [shards[rank].flats for rank in sorted(shards)])
    return _from_stage_2(tag, groups, [shards[rank].flats for rank in sorted(shards)], shards[0].paddings)


@dataclass(frozen=True)
class _Shard:
    """One rank's optimiser state.

    flats: flattened master weights, one tensor per parameter group. num_ranks: ranks that saved; None if not recorded.
    paddings: per group, padding elements behind each parameter (stages 1 and 2 with `parameter_alignment`).
    """

    stage: int
    flats: list[Tensor]
    num_ranks: int | None
    paddings: list[list[int]] | None


def _shard(path: Path) -> _Shard:
    content = _load(path)
    try:
        state = content["optimizer_state_dict"]
        # BF16_Optimizer (stage 1 with float32 gradients) writes the master weights without `zero_stage`.
        stage = int(state.get("zero_stage", 1))
        if stage not in (1, 2, 3):
            raise UserError(f"{path}: zero_stage is {stage}, expected 1, 2 or 3")
        flats = state["fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"]
        counts = state.get("partition_count")
        num_ranks = None if counts is None else int(max(counts) if isinstance(counts, list) else counts)
        return _Shard(stage, [flat.reshape(-1) for flat in flats], num_ranks, state.get("param_alignment_paddings"))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: not a rank's optimiser state ({type(error).__name__}: {error})") from None


def _shards(tag: Path) -> dict[int, Path]:
    found: dict[int, Path] = {}
    for path in tag.glob("*_optim_states.pt"):
        match = _RANK.fullmatch(path.name)
        if match is None or match[2] != "00":
            raise UserError(f"{path}: written by a model-parallel run, which cannot be converted")
        found[int(match[1])] = path
    return found


def _check_complete(tag: Path, paths: Mapping[int, Path], shards: Mapping[int, _Shard]) -> None:
    """Check that there is one file per rank of one save; surplus files are left over from a save by more ranks."""
    said = {shard.num_ranks for shard in shards.values()}
    expected = max((num for num in said if num is not None), default=max(paths) + 1)
    missing = sorted(set(range(expected)) - set(paths))
    if missing:
        raise UserError(f"{tag}: {expected} ranks wrote it; the optimiser's state of rank {missing[0]} is missing")
    if len(said) > 1 or len(paths) > expected or len({shard.stage for shard in shards.values()}) > 1:
        raise UserError(
            f"{tag}: its files are of several saves (of {', '.join(map(str, sorted(map(str, said))))} ranks, there are "
            f"{len(paths)} files); delete those that do not belong to the last one"
        )


def _shapes(tag: Path) -> list[dict[str, tuple[int, ...]]]:
    """Names and shapes of the trainable parameters, one mapping per parameter group of the optimiser."""
    paths = sorted(tag.glob("*mp_rank_00_model_states.pt"))
    if not paths:
        raise UserError(f"{tag}: holds no *_model_states.pt, which names the parameters")
    groups = _load(paths[0], whole=False).get("param_shapes")
    if not groups:
        raise UserError(f"{paths[0]}: names no parameters (param_shapes)")
    groups = groups if isinstance(groups, list) else [groups]
    try:
        return [{str(name): tuple(map(int, shape)) for name, shape in group.items()} for group in groups]
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{paths[0]}: param_shapes: not names and shapes ({error})") from None


def _from_stage_3(tag: Path, groups: list[dict[str, tuple[int, ...]]], ranks: list[list[Tensor]]) -> dict[str, Tensor]:
    """Stage 3: each parameter is padded and split over all ranks; a rank stores its pieces one after the other."""
    streams = [torch.cat(flats) for flats in ranks]
    found: dict[str, Tensor] = {}
    at = 0
    for name, shape in ((n, s) for group in groups for n, s in group.items()):
        numel = math.prod(shape)
        piece = -(-numel // len(ranks))  # rounded up: the last rank's piece ends with padding
        _check_inside(tag, name, at + piece, min(map(len, streams)))
        whole = torch.cat([stream[at : at + piece] for stream in streams])[:numel]
        found[name] = whole.reshape(shape).clone()
        at += piece
    _check_consumed(tag, at, max(map(len, streams)), 0)
    return found


def _from_stage_2(
    tag: Path,
    groups: list[dict[str, tuple[int, ...]]],
    ranks: list[list[Tensor]],
    paddings: list[list[int]] | None,
) -> dict[str, Tensor]:
    """Stages 1 and 2: the parameters of a group are concatenated, and each rank holds a consecutive part of that."""
    found: dict[str, Tensor] = {}
    if any(len(flats) != len(groups) for flats in ranks):
        raise UserError(f"{tag}: {len(groups)} groups of parameters are named, {len(ranks[0])} are stored")
    for number, group in enumerate(groups):
        stream = torch.cat([flats[number] for flats in ranks])
        behind = [0] * len(group) if paddings is None else paddings[number]
        at = 0
        for (name, shape), padding in zip(group.items(), behind, strict=True):
            numel = math.prod(shape)
            _check_inside(tag, name, at + numel, len(stream))
            found[name] = stream[at : at + numel].reshape(shape).clone()
            at += numel + padding
        # DeepSpeed pads a group to a multiple of 2 elements per rank, and once more after `parameter_alignment`.
        _check_consumed(tag, at, len(stream), 4 * len(ranks))
    return found


def _check_inside(tag: Path, name: str, end: int, length: int) -> None:
    if end > length:
        raise UserError(f"{tag}: {name}: the ranks' files end before it")


def _check_consumed(tag: Path, used: int, length: int, filling: int) -> None:
    """Refuse surplus elements: they would mean that parameters were read from wrong positions."""
    if length - used > filling:
        raise UserError(f"{tag}: {length - used} elements of the ranks' files belong to no named parameter")


def _load(path: Path, *, whole: bool = True) -> dict[str, Any]:
    """Load a file of tensors, plain values and four of DeepSpeed's classes; anything else is refused, not run.

    Tensors are memory-mapped, not read.

    Args:
        whole: whether the tensors will be used: then their checksums are verified, which torch does not do.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    allowed = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
    try:
        _check_sums(path, whole=whole)
        with torch.serialization.safe_globals(allowed):
            content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UnpicklingError as error:
        reason = next((line for line in str(error).splitlines() if "GLOBAL" in line or "global" in line), str(error))
        raise UserError(f"{path}: refused: it holds more than tensors ({in_one_line(reason, 200)})") from None
    except Exception as error:  # noqa: BLE001 - damaged files raise many types
        first_line = next(iter(str(error).splitlines()), "")
        raise UserError(f"{path}: damaged ({type(error).__name__}: {in_one_line(first_line, 120)})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, expected a dictionary")
    return content


def _check_sums(path: Path, *, whole: bool) -> None:
    """Verify the checksums of a .pt file, which is a zip file.

    Raises:
        zipfile.BadZipFile: a checksum is wrong.
    """
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if whole or name.endswith("data.pkl")]
        for name in names:
            with archive.open(name) as entry:  # zipfile compares the CRC when the end is read
                while entry.read(2**20):
                    pass
