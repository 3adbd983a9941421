"""What is refused before any data is read: checks that need more than the recipe itself."""

from __future__ import annotations

import importlib.util
import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

from uft_ds.architectures.facts import positions_limit
from uft_ds.engine.engine import read_deepspeed_file
from uft_ds.engine.zero_section import check_ranks
from uft_ds.errors import UserError
from uft_ds.recipe.schema import Recipe
from uft_ds.run.resolve import adapter_folder, cache_dir, caches_reference, reference_mode
from uft_ds.streams.accept import accepted_policy
from uft_ds.streams.adapters import start_from_adapter
from uft_ds.streams.identity import OnFile, base_identity
from uft_ds.streams.load import attention_implementation, check_base, empty_base
from uft_ds.streams.model import UFTModel
from uft_ds.streams.weights import check_weights


def check_recipe(recipe: Recipe) -> None:
    """Refuse what would fail after the launch; nothing is written.

    Raises:
        UserError: names the recipe's key.
    """
    read_deepspeed_file(recipe.deepspeed)
    assert recipe.lora is not None
    config = check_base(recipe.model.base, recipe.model.revision)
    attention_implementation(recipe.model.attention, getattr(torch, recipe.model.dtype), config)
    # Without weights: what would be refused after the launch is refused before it.
    base, lora = empty_base(config), recipe.lora
    if Path(recipe.model.base).exists():  # a hub model's weights are fetched later: `prepare.run_identity`
        check_weights(Path(recipe.model.base), base)
    policy = accepted_policy(base, rank=lora.rank, alpha=lora.alpha, targets=lora.targets, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT's, of a property of transformers
        if recipe.reference.adapter is not None:
            start_from_adapter(policy, adapter_folder(recipe.reference.adapter))
        UFTModel(policy, reference_mode=reference_mode(recipe))
    _check_positions(config, recipe.data.max_length)
    if recipe.model.attention == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        raise UserError("model.attention: flash_attention_2 needs flash-attn: pip install 'uft-ds[gpu]', or take auto")
    if caches_reference(recipe):
        _check_writable(cache_dir(recipe))
    if "wandb" in recipe.tracking and importlib.util.find_spec("wandb") is None:
        raise UserError("tracking: wandb is not installed: pip install 'uft-ds[wandb]', or leave it out")


def check_sharding(recipe: Recipe, *, ranks: int, ranks_per_node: int | None) -> list[str]:
    """Refuse a number of ranks that the recipe's DeepSpeed file cannot be run on.

    Args:
        ranks_per_node: None where it is not known.
    Returns:
        what the user should read before the run.
    Raises:
        UserError: names the file and its key.
    """
    zero = read_deepspeed_file(recipe.deepspeed)["zero_optimization"]
    return check_ranks(zero, recipe.deepspeed, ranks=ranks, ranks_per_node=ranks_per_node)


def check_inputs_lie_outside(recipe: Recipe) -> None:
    """A run's folder may be emptied: nothing that the run reads may lie in it."""
    paths = {
        "model.base": recipe.model.base,
        "model.chat_template": recipe.model.chat_template,
        "deepspeed": recipe.deepspeed,
        "reference.adapter": recipe.reference.adapter,
        "reference.cache_dir": recipe.reference.cache_dir,
        "data.cache_dir": recipe.data.cache_dir,
        **{f"data.sources.{i}.path": entry.path for i, entry in enumerate(recipe.data.sources)},
        **{f"data.held_out.{i}.path": entry.path for i, entry in enumerate(recipe.data.held_out)},
    }
    for key, path in paths.items():
        if path is not None and Path(path).is_relative_to(recipe.output):
            raise UserError(
                f"output: {key} {path} lies inside {recipe.output}, which a run may empty; "
                "give another folder for the run"
            )


def check_adapter_is_of_base(recipe: Recipe, on_file: OnFile) -> None:
    """Refuse a reference adapter that was trained on another base: of the same shape, it would load without a word.

    Raises:
        UserError: names both.
    """
    assert recipe.reference.adapter is not None
    folder, base = Path(recipe.reference.adapter), recipe.model.base
    theirs = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
    if theirs is None or theirs == base or (not Path(theirs).is_dir() and Path(theirs).name == Path(base).name):
        return
    ours = base_identity(base, recipe.model.revision, on_file)
    if Path(theirs).is_dir() and base_identity(theirs, None, on_file) == ours:
        return
    raise UserError(
        f"reference.adapter: {folder} was trained on {theirs}, model.base is {base}: the same adapter on other weights "
        "is another model (if the weights are the same, mend base_model_name_or_path in its adapter_config.json)"
    )


def _check_positions(config: Any, max_length: int) -> None:
    """Some rotary embeddings change all positions with the longest one: then sequences packed together, and the turns
    of one conversation, would not be what they are alone."""
    found = positions_limit(config)
    if found is not None and max_length > found[1]:
        kind, limit = found
        raise UserError(
            f"data.max_length: {max_length} is past the {limit} positions of this model, whose {kind!r} rotary "
            f"embeddings then change with the longest sequence of a micro-batch; expected at most {limit}"
        )


def _check_writable(folder: Path) -> None:
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise UserError(
            f"reference.cache_dir: {folder} cannot be written ({error.strerror}); "
            "give another folder, or set reference.cache: false"
        ) from None
