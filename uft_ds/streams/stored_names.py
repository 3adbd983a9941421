"""Which stored tensors make up each parameter of a model: names in memory are not always names in the files.

transformers renames tensors when it loads them (Gemma 3's multimodal class stores `language_model.model.*` and holds
`model.language_model.*`) and puts some together (a mixture's experts become one parameter). Its own conversion mapping
says how, so it is asked here, tensor by tensor, instead of being repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from uft_ds.errors import UserError


@dataclass(frozen=True)
class Origin:
    """The stored tensors that one parameter is made of.

    names: in the files, in the order in which they are put together.
    patterns: for each name, the pattern of `converter` that it matches.
    converter: transformers' rule that puts them together; None if the one stored tensor is the parameter.
    first: the parameter by which the rule is known; a rule may make several parameters.
    """

    names: tuple[str, ...]
    patterns: tuple[str, ...] = ()
    converter: WeightConverter | None = None
    first: str = ""

    @property
    def is_one_tensor(self) -> bool:
        """Whether the parameter is stored as it is, under one name."""
        return self.converter is None and len(self.names) == 1


def origins(model: Any, empty: Mapping[str, Tensor]) -> dict[str, Origin]:
    """The origin of each parameter of a model, by its name in memory; parameters that no file holds are left out.

    Args:
        model: on the meta device; without adapters, because they change its names.
        empty: stored tensors by their names in the files, on the meta device.
    """
    own = model.state_dict()
    mapping = get_model_conversion_mapping(model)
    renamings = [rule for rule in mapping if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in mapping if isinstance(rule, WeightConverter)]
    converter_of = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    parts: dict[str, list[tuple[str, str | None]]] = {}
    for stored in sorted(empty, key=dot_natural_key):
        name, pattern = rename_source_key(stored, renamings, converters, model.base_model_prefix, own)
        if name not in own and stored in own:
            name, pattern = rename_source_key(stored, [], [], model.base_model_prefix, own)
        parts.setdefault(name, []).append((stored, pattern))
    found: dict[str, Origin] = {}
    for name, pairs in parts.items():
        names = tuple(stored for stored, _ in pairs)
        if pairs[0][1] is None:
            found[name] = Origin(names)
            continue
        patterns = tuple(str(pattern) for _, pattern in pairs)
        origin = Origin(names, patterns, converter_of[patterns[0]], name)
        found |= dict.fromkeys(_converted(origin, [empty[stored] for stored in names], model), origin)
    return {name: origin for name, origin in found.items() if name in own}


def converted_parameter(model: Any) -> str | None:
    """The first parameter that transformers writes into files as other tensors, such as one of routed experts; None if
    it only renames them.

    Args:
        model: may be on the meta device; without adapters.
    """
    # In reverse, as transformers itself writes a model; rules for old files are not reversed.
    rules = reversed(get_model_conversion_mapping(model, add_legacy=False))
    converters: list[Any] = [rule.reverse_transform() for rule in rules if isinstance(rule, WeightConverter)]
    names = (name for name, _ in model.named_parameters())
    return next((name for name in names if rename_source_key(name, [], converters)[1] is not None), None)


def read_parameter(name: str, origin: Origin, read: Callable[[str], Tensor], model: Any) -> Tensor:
    """One parameter, put together from its stored tensors as transformers does it.

    Args:
        name: of the parameter, in memory.
        read: returns one stored tensor.
        model: as for `origins`.
    """
    tensors = [read(stored) for stored in origin.names]
    return tensors[0] if origin.converter is None else _converted(origin, tensors, model)[name]


def stored_weights(folder: Path, model: Any, empty: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, str]:
    """For each weight that gets an adapter, the name under which the files hold it.

    Args:
        folder: of the files, for messages.
        model: as for `origins`, and so is `empty`.
        names: in memory, such as `model.layers.0.mlp.up_proj.weight`.
    Raises:
        UserError: the files lack a weight, or hold it in several tensors, so that nothing can be added to it.
    """
    found = origins(model, empty)
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    stored = {}
    for name in names:
        twins = [twin for pair in tied.items() if name in pair for twin in pair if twin not in found]
        if name not in found or twins:
            one = " (it is the embedding, and the model has no head of its own)" if twins else ""
            raise UserError(
                f"{folder}: holds no {twins[0] if twins else name}, which the adapter changes{one}; "
                "the adapter is of another model"
            )
        if not found[name].is_one_tensor:
            parts = found[name].names
            raise UserError(
                f"{folder}: {name} is stored as {parts[0]} (of {len(parts)}), which transformers converts when it "
                "loads them: no adapter can be merged into it; take other lora.targets"
            )
        stored[name] = found[name].names[0]
    return stored


@dataclass(frozen=True)
class StoredExpert:
    """One stored tensor, name: it holds rows of one expert's part of a weight [experts, out, in]."""

    name: str
    expert: int
    rows: Tensor


def stored_experts(
    folder: Path, model: Any, empty: Mapping[str, Tensor], names: Collection[str]
) -> dict[str, tuple[StoredExpert, ...]]:
    """For each weight of all routed experts, the stored tensors that it is put together from.

    transformers' own reversal of its rule is applied to the numbers of the rows, so it says which rows a tensor holds.

    Args:
        folder, model, empty: as for `stored_weights`.
        names: in memory, such as `model.layers.0.mlp.experts.down_proj`.
    Raises:
        UserError: the files lack a weight, or do not hold it expert by expert.
    """
    if not names:
        return {}
    found, own = origins(model, empty), dict(model.named_parameters())
    return {name: _by_expert(folder, model, name, own.get(name), found.get(name)) for name in names}


def _by_expert(
    folder: Path, model: Any, name: str, weight: Tensor | None, origin: Origin | None
) -> tuple[StoredExpert, ...]:
    if weight is None or origin is None:
        raise UserError(f"{folder}: holds no {name}, which the adapter changes; the adapter is of another model")
    experts, rows, _ = weight.shape
    numbers = torch.arange(experts * rows).reshape(experts, rows, 1)
    parts = revert_weight_conversion(model, {name: numbers})
    pieces = []
    for stored, part in parts.items():
        of_part = part.flatten()
        expert = {int(number) // rows for number in of_part[[0, -1]]}
        if stored not in origin.names or part.dim() != 2 or len(expert) != 1:
            raise UserError(
                f"{folder}: {name} is stored as {origin.names[0]} (of {len(origin.names)}), not expert by expert: no "
                "adapter can be merged into it; leave lora.experts out"
            )
        pieces.append(StoredExpert(stored, expert.pop(), of_part % rows))
    return tuple(pieces)


def stored_parameters(folder: Path, model: Any, empty: Mapping[str, Tensor]) -> dict[str, tuple[str, ...]]:
    """The names under which the files hold each parameter, for a model of which all parameters are trained.

    Two weights that are one may stand in the files twice.

    Args:
        folder: of the files, for messages.
        model: as for `origins`, and so is `empty`.
    Raises:
        UserError: a parameter is stored in several tensors, or in none.
    """
    found = origins(model, empty)
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    stored = {}
    for name, _ in model.named_parameters():
        twins = (twin for twin, owner in tied.items() if owner == name)
        places = [found[one] for one in (name, *twins) if one in found]
        divided = next((place for place in places if not place.is_one_tensor), None)
        if divided is not None:
            raise UserError(
                f"lora: null given, but {folder} holds {name} as {divided.names[0]} (of {len(divided.names)}), which "
                "transformers converts when it loads them: all its parameters cannot be written back; train adapters"
            )
        if not places:
            raise UserError(f"{folder}: holds no {name}; it is the folder of another model")
        stored[name] = tuple(dict.fromkeys(place.names[0] for place in places))
    return stored


def _converted(origin: Origin, tensors: list[Tensor], model: Any) -> dict[str, Tensor]:
    rule: Any = deepcopy(origin.converter)  # its annotations know futures alone, its code takes tensors
    for stored, pattern, tensor in zip(origin.names, origin.patterns, tensors, strict=True):
        rule.add_tensor(origin.first, stored, pattern, tensor)
    made = rule.convert(origin.first, model=model, config=model.config)
    return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}
