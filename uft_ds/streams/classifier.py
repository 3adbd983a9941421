"""The sequence classifier of Hugging Face that a reward model becomes: whether there is one, and what it must hold."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from uft_ds.architectures.facts import family_of
from uft_ds.errors import UserError
from uft_ds.host.terminal import in_one_line
from uft_ds.streams.stored_names import origins

HEAD = "score"
"""The head's attribute in those classes, and its name in PEFT's `modules_to_save`."""


def classifier_config(config: Any) -> Any:
    """The config with one label, as `AutoModelForSequenceClassification` reads it; the given one is not changed."""
    made = type(config).from_dict(config.to_dict())
    made.num_labels = 1
    return made


def empty_classifier(config: Any) -> Any:
    """Hugging Face's sequence classifier with one label, on the meta device.

    Args:
        config: of the base; its number of labels plays no part.
    Raises:
        UserError: there is none for this architecture, or its head is not one linear layer without a bias.
    """
    name = type(config).__name__.removesuffix("Config")
    try:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            model = AutoModelForSequenceClassification.from_config(classifier_config(config), trust_remote_code=False)
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError(
            f"objective.reward: head needs a sequence classifier of transformers to be converted to, and {name} has "
            f"none ({_reason(error)}); take a model.base of another architecture"
        ) from None
    head = getattr(model, HEAD, None)
    if not isinstance(head, nn.Linear) or head.bias is not None or head.out_features != 1:
        raise UserError(
            f"objective.reward: head: the head of {type(model).__name__} is no linear layer {HEAD!r} without a bias, "
            "into which a reward model could be converted; take a model.base of another architecture"
        )
    return model


def _reason(error: Exception) -> str:
    """Transformers' first line; the next ones list all model types that have a classifier."""
    first_line, *_ = str(error).strip().splitlines() or [type(error).__name__]
    return in_one_line(first_line, 300).removesuffix(".")


def check_classifier(config: Any, causal: Any, empty: Mapping[str, Tensor]) -> None:
    """Refuse a base from whose weights and a head no sequence classifier can be made.

    Args:
        causal: the base, on the meta device.
        empty: the stored tensors of the base by their names in the files, on the meta device.
    Raises:
        UserError: there is no such classifier, its decoder is another one, or it needs weights that the base lacks.
    """
    model = empty_classifier(config)
    decoder, own = (getattr(found, found.base_model_prefix, None) for found in (model, causal))
    found = origins(model, empty)
    missing = [name for name in model.state_dict() if name not in found and name != f"{HEAD}.weight"]
    if type(decoder) is not type(own) or missing:
        why = f"needs {missing[0]}, which the base lacks" if missing else f"is built on {type(decoder).__name__}"
        raise UserError(
            f"objective.reward: head: {type(model).__name__} {why}, so a reward model of {type(causal).__name__} could "
            f"not be converted; take a model.base of another architecture than {family_of(config).name or 'this one'}"
        )
