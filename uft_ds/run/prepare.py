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
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from uft_ds.data.mixture import Steps, epoch_amounts, plan_steps, units_of_epochs
from uft_ds.data.sources import PreparedSource, open_source, prepare_source
from uft_ds.data.store.sequences import write_sample
from uft_ds.data.store.tokenized import is_whole, read_key_parts
from uft_ds.data.tokens.chat_tokenizer import ChatTokenizer
from uft_ds.data.tokens.tokenize import load_tokenizer
from uft_ds.errors import UserError
from uft_ds.host.files import write_atomically
from uft_ds.host.locks import Lock
from uft_ds.objectives.losses import NEEDS_PAIRS
from uft_ds.recipe.file import stored_recipe
from uft_ds.recipe.rules import beta_problems
from uft_ds.recipe.schema import Recipe, SourceSection
from uft_ds.record.run_folder import RunFolder, check_claimable, claim, release
from uft_ds.run.checks import check_adapter_is_of_base, check_inputs_lie_outside, check_recipe
from uft_ds.run.resolve import (
    source_of,
    tokenized_dir,
    tolerance_of,
    with_absolute_paths,
    with_fixed_revision,
)
from uft_ds.streams.identity import adapter_identity, base_identity, local_folder
from uft_ds.streams.load import check_base, meta_model
from uft_ds.streams.weights import check_weights

OnProgress = Callable[[str, int, int], None]
"""Called with what is being done, and how much of it is done: bytes or files, of how many."""


@dataclass(frozen=True)
class PreparedData:
    train: tuple[PreparedSource, ...]
    held_out: tuple[PreparedSource, ...]

    @property
    def all(self) -> tuple[PreparedSource, ...]:
        return (*self.train, *self.held_out)

    @cached_property
    def epoch_amounts(self) -> list[float]:
        """How many responses one epoch of the mixture takes of each training source, about.

        Raises:
            ValueError: the shares do not make a whole.
        """
        return epoch_amounts([source.ingredient for source in self.train])


def prepare_data(
    recipe: Recipe, chat: ChatTokenizer, on_progress: OnProgress = lambda label, done, total: None
) -> PreparedData:
    """Read, check and tokenise all sources; of those that have been tokenised before, only the content is hashed."""

    def prepare(entry: SourceSection) -> PreparedSource:
        source = source_of(recipe, entry)
        return prepare_source(
            source,
            chat,
            tokenized_dir(recipe),
            seed=recipe.train.seed,
            tolerance=tolerance_of(recipe),
            workers=recipe.data.workers,
            on_progress=lambda done, total: on_progress(f"reading {source.label}", done, total),
        )

    data = PreparedData(
        tuple(prepare(entry) for entry in recipe.data.sources),
        tuple(prepare(entry) for entry in recipe.data.held_out),
    )
    _check_no_source_twice(data)
    _check_kinds(recipe, data)
    _check_units_fit(recipe, data)
    _check_mixture(recipe, data)
    return data


def open_data(recipe: Recipe, folder: RunFolder) -> PreparedData:
    """What was prepared for a run, as its folder says."""
    report = _read_report(folder)

    def opened(part: str, entries: list[SourceSection]) -> tuple[PreparedSource, ...]:
        rows = zip(report[part], entries, strict=True)
        return tuple(
            open_source(
                source_of(recipe, entry),
                tokenized_dir(recipe),
                row["tokens_key"],
                tuple(row["files"]),
                seed=recipe.train.seed,
            )
            for row, entry in rows
        )

    return PreparedData(opened("train", recipe.data.sources), opened("held_out", recipe.data.held_out))


def ensure_data(recipe: Recipe, folder: RunFolder) -> None:
    """Tokenise, on this machine, what was prepared on another one and is not here.

    Raises:
        UserError: the data is not the same here.
    """
    report = _read_report(folder)
    keys = {row["tokens_key"] for part in ("train", "held_out") for row in report[part]}
    missing = {key for key in keys if not is_whole(tokenized_dir(recipe) / key)}
    if not missing:
        return
    chat = load_tokenizer(recipe.model.base, revision=recipe.model.revision, chat_template=recipe.model.chat_template)
    here = {source.key: source.label for source in prepare_data(recipe, chat).all}
    if keys - set(here):
        other = sorted(set(here) - keys)
        raise UserError(
            f"{here[other[0]] if other else recipe.data.sources[0].path}: on {platform.node()} its content, the "
            "tokenizer or the installed versions are not those of the machine that prepared the run; make them the same"
        )


def steps_of(recipe: Recipe, data: PreparedData) -> Steps:
    """All steps of a run."""
    return plan_steps(
        [source.ingredient for source in data.train],
        seed=recipe.train.seed,
        examples_per_step=recipe.train.examples_per_step,
        epochs=recipe.train.epochs,
        steps=recipe.train.steps,
    )


def _read_report(folder: RunFolder) -> dict[str, Any]:
    try:
        report: dict[str, Any] = json.loads(folder.data_report().read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder.data_report()}: cannot be read ({error}); the run was not prepared") from None
    return report


def _check_no_source_twice(data: PreparedData) -> None:
    """The recipe's own check compares names: a copy, a link or another spelling of the path is found by its content."""
    seen: dict[str, str] = {}
    for source in data.all:
        if source.key in seen:
            raise UserError(f"{source.label}: holds the rows of {seen[source.key]}; no row may be used twice")
        seen[source.key] = source.label


def _check_kinds(recipe: Recipe, data: PreparedData) -> None:
    """Each kind of responses needs a loss, held-out ones too: they are evaluated with it."""
    objective, problems = recipe.objective, []
    held: dict[str, str | dict[str, float]] = {}
    for part, sources in (("data.sources", data.train), ("data.held_out", data.held_out)):
        for number, source in enumerate(sources):
            is_split = source.source.rules.split_pairs
            holds = f"{part}.{number} {source.label} holds"
            for kind in sorted(source.selection.kinds):
                losses = recipe.losses_of(kind)
                held[kind] = dict(losses)
                if not losses:
                    needed = ", and evaluation needs one" if part == "data.held_out" else ""
                    split = " (its pairs: split makes single responses of pairs)" if is_split else ""
                    problems.append(f"loss: no loss for kind {kind!r}, which {holds}{needed}{split}")
                elif kind != "pair" and NEEDS_PAIRS & losses.keys() and is_split:
                    problems.append(
                        f"loss: {objective.loss!r} needs pairs, {part}.{number}.pairs: split makes single responses of "
                        f"those of {source.label}; take pairs: keep"
                    )
                elif kind != "pair" and NEEDS_PAIRS & losses.keys():
                    problems.append(
                        f"loss: {objective.loss!r} needs pairs, {holds} responses of kind {kind!r}: give a loss "
                        f"for each kind, as in {{pair: {objective.loss}, {kind}: mse}}"
                    )
    if isinstance(objective.loss, str) and isinstance(objective.beta, dict):  # only now are the kinds known
        problems += [f"beta: {problem}" for problem in beta_problems(objective, held)]
    trained = {kind for source in data.train for kind in source.selection.kinds}
    if not any(recipe.weight_of(kind) for kind in trained):
        problems.append(f"weights: 0 for {', '.join(sorted(trained))}, which is all that is trained on")
    if problems:
        raise UserError("\n".join(f"objective.{problem}" for problem in problems))


def _check_units_fit(recipe: Recipe, data: PreparedData) -> None:
    """A pair is forwarded at once, and may be longer than one sequence may be."""
    limit = recipe.train.tokens_per_micro_batch
    for source in data.all:
        store, units_U = source.selection.store, source.selection.units_U
        longest = int(units_U[np.argmax(store.tokens_U[units_U])])
        if store.tokens_U[longest] > limit:
            raise UserError(
                f"train.tokens_per_micro_batch: {limit} given, but the pair of {store.origin(longest)} has "
                f"{store.tokens_U[longest]} tokens; raise it, or lower data.max_length {recipe.data.max_length}"
            )


def _check_mixture(recipe: Recipe, data: PreparedData) -> None:
    """The portions make a whole, of which a step can be made."""
    # Repeated until it has filled train.steps, a mixture must hold something at each pass, or that takes for ever.
    epochs = 1 if recipe.train.steps is not None else recipe.train.epochs
    try:
        is_empty = units_of_epochs([source.ingredient for source in data.train], epochs) == 0
    except ValueError as error:
        raise UserError(f"data.sources: {error}") from None
    if not is_empty:
        return
    lines = []
    for number, (entry, amount) in enumerate(zip(recipe.data.sources, data.epoch_amounts, strict=True)):
        key = "epochs" if entry.share is None else "share"
        found = data.train[number].selection.num_responses
        lines.append(
            f"data.sources.{number}.{key}: {getattr(entry, key)} given, which takes {amount:.3g} of {found} responses"
        )
    total = f"{sum(data.epoch_amounts):.3g} responses{'' if epochs == 1 else f' an epoch, of {epochs}'}"
    raise UserError(
        "\n".join(lines) + f"\nthe mixture holds {total}: less than half a row of each source, so no step can be made; "
        f"a step takes {recipe.train.examples_per_step} (train.examples_per_step), the last one at least 1; raise "
        "the number above"
    )


def prepare_run(
    recipe: Recipe,
    *,
    overwrite: bool,
    on_progress: OnProgress = lambda label, done, total: None,
    lock: Lock | None = None,
) -> tuple[RunFolder, PreparedData, Lock]:
    """Check everything, then claim the run's folder and write the tokenised data and the run's identity there.

    Args:
        lock: of the folder, where the caller has claimed it.
    Returns:
        the folder, what was prepared, and the folder's lock.
    Raises:
        UserError: nothing has been written.
    """
    recipe = with_absolute_paths(recipe)
    folder = RunFolder(Path(recipe.output))
    check_claimable(folder, overwrite=overwrite)
    recipe, data = check_run(recipe, on_progress)
    identity = run_identity(recipe, data, on_progress)
    lock = claim(folder, overwrite=overwrite, lock=lock)
    try:
        _write_prepared(folder, recipe, data, identity)
    except BaseException as error:
        release(folder, lock)
        if isinstance(error, OSError):
            raise UserError(f"output: {folder.path} cannot be written ({error.strerror})") from None
        raise
    return folder, data, lock


def check_run(recipe: Recipe, on_progress: OnProgress = lambda label, done, total: None) -> tuple[Recipe, PreparedData]:
    """Check a recipe against its model and its data, which is tokenised by that; the run's folder plays no part.

    Returns:
        the recipe by content: paths absolute, a hub model's revision fixed.
    """
    recipe = with_absolute_paths(recipe)
    check_inputs_lie_outside(recipe)
    check_recipe(recipe)
    recipe = with_fixed_revision(recipe)
    chat = load_tokenizer(recipe.model.base, revision=recipe.model.revision, chat_template=recipe.model.chat_template)
    data = prepare_data(recipe, chat, on_progress)
    if recipe.reference.adapter is not None:
        check_adapter_is_of_base(recipe, partial(on_progress, "hashing the adapter's base"))
    return recipe, data


def run_identity(recipe: Recipe, data: PreparedData, on_progress: OnProgress) -> dict[str, Any]:
    """What a run is of, by content: base weights, adapter, and of each source rows, rules, tokenizer and template."""
    base, adapter = recipe.model.base, recipe.reference.adapter
    content = base_identity(base, recipe.model.revision, partial(on_progress, f"hashing {base}"))
    if not Path(base).exists():  # a local folder's have been checked before any data was read
        check_weights(local_folder(base, recipe.model.revision), meta_model(check_base(base, recipe.model.revision)))
    return {
        "base": content,
        "adapter": adapter_identity(Path(adapter)) if adapter else None,
        "data": {
            f"{part}.{number}": {key: parts[key] for key in ("content", "rules", "tokenizer", "chat_template")}
            for part, sources in (("sources", data.train), ("held_out", data.held_out))
            for number, source in enumerate(sources)
            for parts in [read_key_parts(tokenized_dir(recipe), source.key)]
        },
    }


def _write_prepared(folder: RunFolder, recipe: Recipe, data: PreparedData, identity: dict[str, Any]) -> None:
    folder.sample_data().mkdir(parents=True, exist_ok=True)
    write_sample(folder.sample_data(), [source.selection for source in (*data.held_out, *data.train)])
    if any(source.account.quarantined for source in data.all):
        with folder.quarantine().open("wb") as file:
            for rejected in dict.fromkeys(source.quarantine_file for source in data.all):
                file.write(rejected.read_bytes())
    write_atomically(folder.data_report(), json.dumps(data_report(data), indent=2) + "\n")
    write_atomically(folder.identity, json.dumps(identity, indent=2) + "\n")
    write_atomically(folder.environment, json.dumps(environment(recipe), indent=2) + "\n")
    write_atomically(folder.recipe, stored_recipe(recipe))


def data_report(data: PreparedData) -> dict[str, list[dict[str, object]]]:
    """What each source gives, what was left out, and where its tokens are, as plain values.

    left_out, changed: responses of the whole source by reason, with up to three places for each.
    """

    def row(source: PreparedSource, per_epoch: float) -> dict[str, object]:
        selection, account = source.selection, source.account
        return {
            "source": source.label,
            "score_map": source.source.score_map,
            "responses": selection.num_responses,
            "sequences": selection.num_sequences,
            "tokens": selection.num_tokens,
            "responses_per_epoch": per_epoch,
            "rows": account.rows,
            "rows_not_selected": account.skipped,
            "rows_quarantined": account.quarantined,
            "left_out": account.dropped,
            "changed": account.changed,
            "places": {reason: selection.store.places_of(reason) for reason in account.places},
            "files": source.names,
            "tokens_key": source.key,
        }

    return {
        "train": [row(source, amount) for source, amount in zip(data.train, data.epoch_amounts, strict=True)],
        "held_out": [row(source, source.selection.num_responses) for source in data.held_out],
    }


def environment(recipe: Recipe) -> dict[str, object]:
    """Versions, revision and what the run starts from, by content, for whoever wants to repeat it."""
    adapter = recipe.reference.adapter
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
        "reference_adapter": adapter_identity(Path(adapter)) if adapter else None,
    }


def _git_revision() -> str | None:
    checkout = Path(__file__).parents[2]
    if not (checkout / ".git").exists():  # installed: a repository further up would be somebody else's
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None
