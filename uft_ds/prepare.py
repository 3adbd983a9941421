"""Everything that can be checked or computed before processes are launched, for `uft train` and for rank 0.

The order matters: nothing is written before everything has been found good.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import platform
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch

from uft_ds.checkpoint.save import latest_checkpoint
from uft_ds.data.example import KINDS, Kind
from uft_ds.data.prepare import PreparedSource, Source, prepare_source, write_sequences
from uft_ds.data.tokenize import ChatTokenizer, load_tokenizer
from uft_ds.errors import UserError
from uft_ds.files import user_cache, write_atomically
from uft_ds.model.adapters import add_adapters, start_from_adapter
from uft_ds.model.identity import adapter_identity, base_identity, local_folder
from uft_ds.model.load import check_base, empty_base
from uft_ds.model.uft_model import ReferenceMode, UFTModel
from uft_ds.objectives.objective import Objective
from uft_ds.recipe import Recipe, SourceSection
from uft_ds.recipe_file import dump_recipe
from uft_ds.training.engine import read_deepspeed_file
from uft_ds.training.run_folder import RunFolder, check_claimable, claim, release

OnRow = Callable[[str, int, int], None]
"""Called with what is being done, and how much of it is done: rows or files, of how many."""


@dataclass(frozen=True)
class PreparedData:
    train: tuple[PreparedSource, ...]
    held_out: tuple[PreparedSource, ...]


def check_recipe(recipe: Recipe) -> None:
    """Checks that need more than the recipe itself, and no data.

    Raises:
        UserError: names the recipe's key.
    """
    read_deepspeed_file(recipe.deepspeed)
    assert recipe.lora is not None
    config = check_base(recipe.model.base, recipe.model.revision)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT's, of a property of transformers
        # Without weights: what would be refused after the launch is refused before it.
        policy = add_adapters(
            empty_base(config),
            rank=recipe.lora.rank,
            alpha=recipe.lora.alpha,
            targets=recipe.lora.targets,
            dtype=torch.float32,
            seed=0,
        )
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


def objective_of(recipe: Recipe) -> Objective:
    """The recipe's losses and weights, kind by kind."""
    return Objective(
        {kind: recipe.loss_of(kind) for kind in KINDS},
        {kind: recipe.weight_of(kind) for kind in KINDS},
        recipe.objective.beta,
    )


def reference_mode(recipe: Recipe) -> ReferenceMode:
    """How the reference is forwarded; where none is, the model is left as it is."""
    return recipe.reference.mode if objective_of(recipe).needs_reference else "separate"


def caches_reference(recipe: Recipe) -> bool:
    """Whether the reference is needed, and remembered."""
    return recipe.reference.cache and objective_of(recipe).needs_reference


def _check_positions(config: Any, max_length: int) -> None:
    """Some rotary embeddings change all positions with the longest one: then sequences packed together, and the turns
    of one conversation, would not be what they are alone."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)}
    limit = rope.get("original_max_position_embeddings") or getattr(config, "max_position_embeddings", None)
    found = kinds & {"dynamic", "longrope"}
    if found and limit is not None and max_length > limit:
        raise UserError(
            f"data.max_length: {max_length} is past the {limit} positions of this model, whose {found.pop()!r} rotary "
            f"embeddings then change with the longest sequence of a micro-batch; expected at most {limit}"
        )


def cache_dir(recipe: Recipe) -> Path:
    """Where runs share what they compute of the reference."""
    return Path(recipe.reference.cache_dir) if recipe.reference.cache_dir else user_cache() / "reference"


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


def adapter_folder(path: str) -> Path:
    """The folder of an adapter in PEFT's format: itself, or the one that a checkpoint or a run's newest one holds.

    Raises:
        UserError: there is none, or the checkpoint is damaged.
    """
    folder = Path(path)
    if (folder / "adapter_config.json").is_file():
        return folder
    if not folder.is_dir():
        raise UserError(f"reference.adapter: {path}: no such folder; expected an adapter, a checkpoint or a run")
    try:
        return latest_checkpoint(folder) / "adapter"
    except UserError as error:
        raise UserError(f"reference.adapter: {error}") from None


def source_of(entry: SourceSection) -> Source:
    """A recipe's entry as plain values."""
    return Source(entry.format, entry.path, entry.split, entry.examples, entry.score)


def prepare_data(recipe: Recipe, chat: ChatTokenizer, on_row: OnRow = lambda label, done, total: None) -> PreparedData:
    """Read, check and tokenise all sources."""

    def prepare(entry: SourceSection) -> PreparedSource:
        source = source_of(entry)
        return prepare_source(
            source,
            chat,
            max_length=recipe.data.max_length,
            too_long=recipe.data.too_long,
            merge=recipe.data.merge_conversations,
            seed=recipe.train.seed,
            on_row=lambda done, total: on_row(f"reading {source.label}", done, total),
        )

    data = PreparedData(
        tuple(prepare(entry) for entry in recipe.data.sources),
        tuple(prepare(entry) for entry in recipe.data.held_out),
    )
    _check_kinds(recipe, data)
    return data


def _check_kinds(recipe: Recipe, data: PreparedData) -> None:
    loss = recipe.objective.loss
    if isinstance(loss, str):
        return
    responses = (r for source in (*data.train, *data.held_out) for s in source.sequences for r in s.responses)
    unnamed: set[Kind] = {response.kind for response in responses} - set(loss)
    if unnamed:
        raise UserError(f"objective.loss: no loss for kind {sorted(unnamed)[0]!r}, which the data holds")


def prepare_run(
    recipe: Recipe, *, overwrite: bool, on_row: OnRow = lambda label, done, total: None
) -> tuple[RunFolder, PreparedData, IO[str]]:
    """Check everything, then claim the run's folder and write the tokenised data and the run's identity there.

    Returns:
        the folder, what was prepared, and the folder's lock.
    Raises:
        UserError: nothing has been written.
    """
    recipe = with_absolute_paths(recipe)
    folder = RunFolder(Path(recipe.output))
    check_claimable(folder, overwrite=overwrite)
    _check_inputs_lie_outside(recipe)
    check_recipe(recipe)
    if caches_reference(recipe):
        recipe = _with_fixed_revision(recipe)
    chat = load_tokenizer(recipe.model.base, revision=recipe.model.revision, chat_template=recipe.model.chat_template)
    data = prepare_data(recipe, chat, on_row)
    content = _reference_content(recipe, on_row) if caches_reference(recipe) else None
    lock = claim(folder, overwrite=overwrite)
    try:
        _write_prepared(folder, recipe, data, content)
    except BaseException as error:
        release(folder, lock)
        if isinstance(error, OSError):
            raise UserError(f"output: {folder.path} cannot be written ({error.strerror})") from None
        raise
    return folder, data, lock


def _with_fixed_revision(recipe: Recipe) -> Recipe:
    """A hub model by its commit: what is hashed here must be what the ranks load."""
    if Path(recipe.model.base).exists():
        return recipe
    commit = local_folder(recipe.model.base, recipe.model.revision).name
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"revision": commit})})


def _reference_content(recipe: Recipe, on_row: OnRow) -> dict[str, object]:
    """By content: all that the reference's log-probs depend on besides the tokens and how it is computed."""
    base = recipe.model.base
    on_file = partial(on_row, f"hashing {base}")
    adapter = recipe.reference.adapter
    return {
        **base_identity(base, recipe.model.revision, on_file),
        "adapter": adapter_identity(adapter_folder(adapter)) if adapter else None,
    }


def _write_prepared(
    folder: RunFolder, recipe: Recipe, data: PreparedData, reference_content: dict[str, object] | None
) -> None:
    folder.data_report().parent.mkdir(exist_ok=True)
    for index, source in enumerate(data.train):
        write_sequences(folder.train_data(index), source.sequences)
    write_sequences(folder.held_out_data(), [s for source in data.held_out for s in source.sequences])
    write_atomically(folder.data_report(), json.dumps(data_report(data), indent=2) + "\n")
    if reference_content is not None:
        write_atomically(folder.reference_content, json.dumps(reference_content, indent=2) + "\n")
    write_atomically(folder.environment, json.dumps(environment(), indent=2) + "\n")
    write_atomically(folder.recipe, dump_recipe(recipe))


def with_absolute_paths(recipe: Recipe) -> Recipe:
    """The same recipe wherever it is read from: local paths made absolute, hub and shipped names left alone."""

    def absolute(path: str) -> str:
        return str(Path(path).absolute()) if Path(path).exists() else path

    def sources(entries: list[SourceSection]) -> list[SourceSection]:
        return [entry.model_copy(update={"path": absolute(entry.path)}) for entry in entries]

    template = recipe.model.chat_template
    model = {"base": absolute(recipe.model.base), "chat_template": absolute(template) if template else None}
    data = {"sources": sources(recipe.data.sources), "held_out": sources(recipe.data.held_out)}
    adapter, shared = recipe.reference.adapter, recipe.reference.cache_dir
    reference = {
        # A run's newest checkpoint changes: the one that is meant now is written down.
        "adapter": str(adapter_folder(adapter).absolute()) if adapter else None,
        "cache_dir": str(Path(shared).absolute()) if shared else None,
    }
    return recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update=model),
            "data": recipe.data.model_copy(update=data),
            "reference": recipe.reference.model_copy(update=reference),
            "deepspeed": absolute(recipe.deepspeed) if recipe.deepspeed.endswith(".json") else recipe.deepspeed,
            "output": str(Path(recipe.output).absolute()),
        }
    )


def _check_inputs_lie_outside(recipe: Recipe) -> None:
    """A run's folder may be emptied: nothing that the run reads may lie in it."""
    sources = [entry.path for entry in (*recipe.data.sources, *recipe.data.held_out)]
    reference = recipe.reference.adapter
    shared = recipe.reference.cache_dir
    for path in (recipe.model.base, recipe.model.chat_template, recipe.deepspeed, reference, shared, *sources):
        if path is not None and Path(path).is_relative_to(recipe.output):
            raise UserError(f"output: {path} lies inside {recipe.output}; give another folder for the run")


def data_report(data: PreparedData) -> dict[str, list[dict[str, object]]]:
    """What each source gave and what was left out, as plain values."""

    def row(source: PreparedSource) -> dict[str, object]:
        counts = {"responses": source.num_responses, "sequences": len(source.sequences), "tokens": source.num_tokens}
        left_out = {"dropped": source.dropped, "dropped_origins": source.dropped_origins}
        return {"source": source.label, **counts, **left_out}

    return {"train": [row(source) for source in data.train], "held_out": [row(source) for source in data.held_out]}


def environment() -> dict[str, object]:
    """Versions and revision, for whoever wants to repeat the run."""
    packages = ("uft-ds", "torch", "deepspeed", "transformers", "peft", "datasets", "safetensors", "numpy")
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
        "git_revision": _git_revision(),
    }


def _git_revision() -> str | None:
    checkout = Path(__file__).parents[1]
    if not (checkout / ".git").exists():  # installed: a repository further up would be somebody else's
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None
