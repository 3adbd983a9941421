"""Check, from headers alone, that a model's weight files hold the model of its config.json.

transformers initialises tensors that the files lack at random, and training would continue. Only transformers knows
which stored name belongs to which parameter (prefixes, older names, experts fused into one parameter, tied weights). So
transformers itself "loads" tensors of the meta device, which have a shape but no values, and reports what is wrong.
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
from uft_ds.streams.weight_files import StoredTensor, stored_tensors

_OLD_MASKS = {"bias", "masked_bias", "causal_mask"}
"""Names under which attention kept its causal mask in old checkpoints; transformers 5 builds masks itself."""

_NUMBERS = ("F64", "F32", "F16", "BF16")
"""Types of weights that stand for the numbers themselves."""

_REMEDY = (
    "the folder is incomplete or mixed up: fetch or copy the model again, config.json and all weight files together"
)


@dataclass(frozen=True)
class Loading:
    """The report of transformers on loading weights into a model. Names are the model's, not those in the files.

    mismatched: (name, shape in the files, shape in the model).
    """

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = ()
    errors: tuple[str, ...] = ()


def loading_of(report: Mapping[str, Any]) -> Loading:
    """A `Loading` from the dictionary that `from_pretrained(..., output_loading_info=True)` returns."""
    return Loading(
        missing=tuple(sorted(report["missing_keys"])),
        unexpected=tuple(sorted(report["unexpected_keys"])),
        mismatched=tuple(sorted((name, tuple(found), tuple(own)) for name, found, own in report["mismatched_keys"])),
        errors=tuple(str(message) for message in report["error_msgs"]),
    )


def check_weights(folder: Path, model: Any) -> dict[str, Tensor]:
    """Refuse weight files that do not hold exactly the tensors of a model.

    Tensors of modules that the model does not have at all (a value head, the vision part of a text model) are ignored,
    as transformers ignores them: they do not affect the model's outputs. So are the causal masks that old versions of
    transformers saved with each attention module.

    Args:
        model: the model of the folder's config.json on the meta device (`streams.load.empty_base`); not changed.
    Returns:
        the stored tensors by their names in the files, on the meta device.
    Raises:
        UserError: a file is missing, cut or not a weight file; a tensor is missing, has another shape, has no place in
            the model, or is not stored as floating-point numbers; or the folder holds an adapter too. The message
            names the file and the tensor.
    """
    stored = {tensor.name: (path, tensor) for path in weight_files(folder) for tensor in stored_tensors(path)}
    where = index_file(folder)
    _check_no_adapter(folder)
    _check_numbers(stored, model)
    empty = {name: tensor.empty() for name, (_, tensor) in stored.items()}
    try:
        loading = _load_empty(model, empty)
    except RuntimeError:  # transformers fuses several tensors into one parameter, and their shapes do not match
        lacking = _lacking(model, stored)
        detail = f"lacks {_some(lacking)}" if lacking else "holds tensors that cannot be put together"
        raise UserError(f"model.base: {where}: {detail}; {folder / 'config.json'} asks for more: {_REMEDY}") from None
    problem = problem_of(loading, model)
    if problem is None:
        return empty
    # Name the stored tensors. A missing expert also shows as a mismatch: the fused parameter then has another shape.
    if (loading.missing or loading.mismatched) and (lacking := _lacking(model, stored)):
        problem = f"lacks {_some(lacking)}, which its config.json asks for"
    named = next((path for name, (path, _) in stored.items() if not loading.missing and name in problem), where)
    raise UserError(f"model.base: {named}: {problem}; {_REMEDY}")


def _check_no_adapter(folder: Path) -> None:
    """Refuse a folder that holds an adapter beside the weights: transformers would add it to the model, silently."""
    path = folder / "adapter_config.json"
    if path.is_file():
        raise UserError(
            f"model.base: {path}: an adapter lies beside the model's weights, and transformers would load the model "
            "with it; move the adapter into a folder of its own if the weights are the whole model, or merge it first"
        )


def _check_numbers(stored: Mapping[str, tuple[Path, StoredTensor]], model: Any) -> None:
    """Refuse weights that are stored as integers or in 8 bits: transformers would take them for the numbers."""
    own = dict(model.named_parameters())
    for name, (path, tensor) in stored.items():
        if tensor.code not in _NUMBERS and (name in own or name.endswith(".weight")):
            raise UserError(
                f"model.base: {path}: {name} is stored as {tensor.code}: it is quantised, and without its scale it is "
                "another number; no adapter can be merged into such weights: take the 16-bit model that it was made "
                "from"
            )


def problem_of(loading: Loading, model: Any) -> str | None:
    """One clause that names the first wrong tensor and the number of others; None if the model is complete."""
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
    """The name of the first tensor that holds NaN or infinity; None if all are finite.

    Checking the minimum and the maximum is enough, because both are NaN if any value is NaN. Checking every value with
    isfinite takes 40 times as long. torch compares no 8-bit numbers, so these are read as bfloat16, which holds each of
    them; 4-bit numbers have neither NaN nor infinity.
    """
    for name, values in named:
        if values.is_floating_point() and values.numel() and not values.is_meta:
            if values.dtype.itemsize == 1 and "float8" not in str(values.dtype):
                continue
            least, greatest = torch.aminmax(values.bfloat16() if values.dtype.itemsize == 1 else values)
            if not (torch.isfinite(least) and torch.isfinite(greatest)):
                return name
    return None


def own_values(parameter: nn.Parameter) -> Tensor:
    """This rank's shard of a parameter, flat, or the whole parameter if it is not sharded.

    The padding of the last rank's shard is left out, because nothing ever initialises it. A shard that DeepSpeed has
    moved to a disk (`offload_param.device: nvme`) is not read back: its values are an empty tensor. A NaN in it shows
    before the first step, in the log-probs of policy and reference.
    """
    shard = getattr(parameter, "ds_tensor", None)
    if shard is None:
        return parameter.detach()
    if shard.numel() < shard.ds_numel:  # DeepSpeed leaves one number in memory, which is no weight
        return shard.detach().new_empty(0)
    partitioned: Any = parameter  # DeepSpeed adds the attributes below
    left = partitioned.ds_numel - partitioned.ds_zero_partition_rank * shard.ds_numel
    return shard.detach().flatten()[: max(0, left)]


def _load_empty(model: Any, empty: dict[str, Tensor]) -> Loading:
    with _silent_transformers():
        _, report = type(model).from_pretrained(
            None,
            config=model.config,
            state_dict=empty,
            device_map={"": "meta"},
            ignore_mismatched_sizes=True,  # transformers then reports them instead of raising
            output_loading_info=True,
        )
    return loading_of(report)


def _lacking(model: Any, stored: Collection[str]) -> list[str]:
    """Names under which the model would be saved and that the files lack; empty if the files lack at least half.

    If so much is absent, the files probably use other names, and a list of single tensors would mislead.
    """
    saved = {name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys}
    names = list(revert_weight_conversion(model, saved))
    lacking = [name for name in names if name not in stored]
    return lacking if 2 * len(lacking) < len(names) else []


def _lies_inside(name: str, model: Any) -> bool:
    """Whether a tensor that has no place in the model belongs to a module that the model has."""
    roots = [model, getattr(model, model.base_model_prefix, model)]
    first = name.removeprefix(f"{model.base_model_prefix}.").partition(".")[0]
    if not any(first in dict(root.named_children()) for root in roots):
        return False
    return not any(_is_old_mask(name, dict(root.named_modules())) for root in roots)


def _is_old_mask(name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a tensor without a place is the causal mask of an attention module, which no output depends on.

    A mask lies beside the projections, in a module that only holds others. A bias lies in a module with a weight.
    """
    place, _, leaf = name.rpartition(".")
    module = modules.get(place)
    if leaf not in _OLD_MASKS or module is None:
        return False
    return any(True for _ in module.children()) and not any(True for _ in module.parameters(recurse=False))


def _some(names: Collection[str]) -> str:
    return f"{next(iter(names))}{_others(len(names))}"


def _others(count: int) -> str:
    return "" if count == 1 else f" (and {count - 1} other{'s' if count > 2 else ''})"


@contextmanager
def _silent_transformers() -> Iterator[None]:
    """Within the block, transformers prints neither its loading report (it becomes one message) nor a progress bar."""
    verbosity, has_bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if has_bar:
            transformers_logging.enable_progress_bar()
