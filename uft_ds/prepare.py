"""Everything that can be checked or computed before processes are launched, for `uft train` and for rank 0.

The order matters: nothing is written before everything has been found good.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

from uft_ds.checks import check_adapter_is_of_base, check_inputs_lie_outside, check_recipe
from uft_ds.data.example import Kind
from uft_ds.data.prepare import PreparedSource, prepare_source, write_sequences
from uft_ds.data.tokenize import ChatTokenizer, load_tokenizer
from uft_ds.errors import UserError
from uft_ds.files import write_atomically
from uft_ds.model.identity import adapter_identity, base_identity
from uft_ds.recipe import Recipe, SourceSection
from uft_ds.recipe_file import dump_recipe
from uft_ds.resolve import caches_reference, source_of, with_absolute_paths, with_fixed_revision
from uft_ds.training.run_folder import RunFolder, check_claimable, claim, release

OnRow = Callable[[str, int, int], None]
"""Called with what is being done, and how much of it is done: rows or files, of how many."""


@dataclass(frozen=True)
class PreparedData:
    train: tuple[PreparedSource, ...]
    held_out: tuple[PreparedSource, ...]


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
    check_inputs_lie_outside(recipe)
    check_recipe(recipe)
    if caches_reference(recipe):
        recipe = with_fixed_revision(recipe)
    chat = load_tokenizer(recipe.model.base, revision=recipe.model.revision, chat_template=recipe.model.chat_template)
    data = prepare_data(recipe, chat, on_row)
    if recipe.reference.adapter is not None:
        check_adapter_is_of_base(recipe, partial(on_row, "hashing the adapter's base"))
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


def _reference_content(recipe: Recipe, on_row: OnRow) -> dict[str, object]:
    """By content: all that the reference's log-probs depend on besides the tokens and how it is computed."""
    base = recipe.model.base
    content = base_identity(base, recipe.model.revision, partial(on_row, f"hashing {base}"))
    adapter = recipe.reference.adapter
    return {**content, "adapter": adapter_identity(Path(adapter)) if adapter else None}


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
