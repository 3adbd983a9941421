"""Whether a model's weight files hold the model of its config.json, by their headers: no tensor is read.

transformers draws a tensor that the files lack at random, and trains on. Which name on the disk is which parameter is
transformers' own rule (prefixes, older names, experts fused into one parameter, tied weights), so transformers itself
is asked: it "loads" tensors of the meta device, which have a shape and no values.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging as transformers_logging

from uft_ds.errors import UserError
from uft_ds.streams.identity import index_file, weight_files
from uft_ds.streams.weight_files import stored_tensors

_REMEDY = (
    "the folder is incomplete or mixed up: fetch or copy the model again, config.json and all weight files together"
)


@dataclass(frozen=True)
class Loading:
    """What transformers reports of loading weights into a model; names are the model's, not those on the disk.

    mismatched: name, shape in the files, shape in the model.
    """

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = ()
    errors: tuple[str, ...] = ()


def loading_of(report: Mapping[str, Any]) -> Loading:
    """From the dictionary that `from_pretrained(..., output_loading_info=True)` returns."""
    return Loading(
        missing=tuple(sorted(report["missing_keys"])),
        unexpected=tuple(sorted(report["unexpected_keys"])),
        mismatched=tuple(sorted((name, tuple(found), tuple(own)) for name, found, own in report["mismatched_keys"])),
        errors=tuple(str(message) for message in report["error_msgs"]),
    )


def check_weights(folder: Path, model: Any) -> None:
    """Refuse weight files that do not hold exactly the tensors of a model.

    Tensors of modules that the model does not have at all (a value head, the vision part of a text model) are left
    alone, as transformers leaves them: they change none of the model's outputs.

    Args:
        model: of the folder's config.json, on the meta device (`streams.load.empty_base`); it is not changed.
    Raises:
        UserError: a file is missing, cut or no weight file; a tensor is missing, has another shape, or has no place in
            the model. Names file and tensor.
    """
    stored = {tensor.name: (path, tensor) for path in weight_files(folder) for tensor in stored_tensors(path)}
    if getattr(model.config, "quantization_config", None) is not None:
        return  # the files hold other tensors than the model, by a rule of each method of quantization
    where = index_file(folder)
    empty = {name: tensor.empty() for name, (_, tensor) in stored.items()}
    try:
        loading = _load_empty(model, empty)
    except RuntimeError:  # of transformers: tensors that it puts together do not fit each other
        lacking = _lacking(model, stored)
        detail = f"lacks {_some(lacking)}" if lacking else "holds tensors that cannot be put together"
        raise UserError(f"model.base: {where}: {detail}; {folder / 'config.json'} asks for more: {_REMEDY}") from None
    problem = problem_of(loading, model)
    if problem is None:
        return
    # By the names on the disk; also one of many experts, without which the fused parameter has another shape.
    if (loading.missing or loading.mismatched) and (lacking := _lacking(model, stored)):
        problem = f"lacks {_some(lacking)}, which its config.json asks for"
    named = next((path for name, (path, _) in stored.items() if not loading.missing and name in problem), where)
    raise UserError(f"model.base: {named}: {problem}; {_REMEDY}")


def problem_of(loading: Loading, model: Any) -> str | None:
    """One clause about the first tensor that is wrong and the number of others; None if the model is whole."""
    if loading.missing:
        return f"lacks {_some(loading.missing)}, which its config.json asks for"
    if loading.mismatched:
        name, found, own = loading.mismatched[0]
        others = _others(len(loading.mismatched))
        return f"{name} has shape {list(found)}, expected {list(own)} by its config.json{others}"
    if loading.errors:
        return " ".join(loading.errors[0].split())
    placeless = [name for name in loading.unexpected if _lies_inside(name, model)]
    if placeless:
        return f"holds {_some(placeless)}, for which the model of its config.json has no place"
    return None


def first_non_finite(named: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first tensor that holds NaN or infinity.

    Its least and its greatest value say so, for either is NaN where any value is; isfinite of each takes 40 times as
    long.
    """
    for name, values in named:
        if values.is_floating_point() and values.numel() and not values.is_meta:
            least, greatest = torch.aminmax(values)
            if not (torch.isfinite(least) and torch.isfinite(greatest)):
                return name
    return None


def own_values(parameter: nn.Parameter) -> Tensor:
    """This rank's shard of a parameter, flat, without the padding of the last rank, which is never written; the whole
    parameter where it is not sharded."""
    shard = getattr(parameter, "ds_tensor", None)
    if shard is None:
        return parameter.detach()
    partitioned: Any = parameter  # what DeepSpeed adds to it
    left = partitioned.ds_numel - partitioned.ds_zero_partition_rank * shard.ds_numel
    return shard.detach().flatten()[: max(0, left)]


def _load_empty(model: Any, empty: dict[str, Tensor]) -> Loading:
    with _silent_transformers():
        _, report = type(model).from_pretrained(
            None,
            config=model.config,
            state_dict=empty,
            device_map={"": "meta"},
            ignore_mismatched_sizes=True,  # reported, not raised
            output_loading_info=True,
        )
    return loading_of(report)


def _lacking(model: Any, stored: Collection[str]) -> list[str]:
    """Names on the disk that the model would be saved under and that are not there; none if most are not."""
    saved = {name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys}
    names = list(revert_weight_conversion(model, saved))
    lacking = [name for name in names if name not in stored]
    return lacking if 2 * len(lacking) < len(names) else []


def _lies_inside(name: str, model: Any) -> bool:
    """Whether a tensor without a place belongs to a module that the model has."""
    prefix = model.base_model_prefix
    first = name.removeprefix(f"{prefix}.").partition(".")[0]
    backbone = getattr(model, prefix, model)
    return any(first in dict(module.named_children()) for module in (model, backbone))


def _some(names: Collection[str]) -> str:
    return f"{next(iter(names))}{_others(len(names))}"


def _others(count: int) -> str:
    return "" if count == 1 else f" (and {count - 1} other{'s' if count > 2 else ''})"


@contextmanager
def _silent_transformers() -> Iterator[None]:
    """Within the block transformers prints neither its report, which becomes one message here, nor a loading bar."""
    verbosity, has_bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if has_bar:
            transformers_logging.enable_progress_bar()
