"""Check a run and tokenise its data before any process is launched; used by `uft train` and by rank 0.

The order matters: the run's folder is written only after every check has passed.
"""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from functools import partial
from typing import Any

from uft_ds.checkpoint.owner import RUN
from uft_ds.data.mixture import units_of_epochs
from uft_ds.data.rows.reading import SourceFiles, find_data
from uft_ds.data.sources import (
    PreparedData,
    PreparedSource,
    SourceSettings,
    check_no_source_twice,
    check_units_fit,
    open_source,
    prepare_source,
)
from uft_ds.data.store.store_files import check_content
from uft_ds.data.store.tokenized import is_whole
from uft_ds.data.tokens.chat_tokenizer import ChatTokenizer
from uft_ds.data.tokens.padding import padding_id
from uft_ds.data.tokens.vocabulary import check_fits_embedding
from uft_ds.engine.deepspeed_file import with_deepspeed_file
from uft_ds.errors import UserError
from uft_ds.host.callbacks import OnProgress
from uft_ds.host.files import write_atomically
from uft_ds.host.locks import Lock
from uft_ds.recipe.file import stored_recipe
from uft_ds.recipe.rules import kind_problems
from uft_ds.recipe.settings import Settings
from uft_ds.record.run_folder import RunFolder, check_claimable, claim, release
from uft_ds.run.checks import check_adapters_are_of_base, check_inputs_lie_outside, check_recipe
from uft_ds.run.identity import environment, owner, run_identity
from uft_ds.run.online import check_online
from uft_ds.run.reward_stream import check_reads_the_same_text, reward_model_of
from uft_ds.run.settings import with_fixed_revision
from uft_ds.run.start_adapter import Start, start_of, write_sample_of, write_start
from uft_ds.run.task_identity import task_identities, write_task_identities
from uft_ds.run.tasks import check_tasks
from uft_ds.streams.base_weights import stored_in_nf4
from uft_ds.streams.classifier import check_classifier
from uft_ds.streams.data_tokenizer import data_tokenizer
from uft_ds.streams.identity import local_folder
from uft_ds.streams.load import check_base, check_base_files, embedding_rows
from uft_ds.streams.nf4 import check_can_be_nf4
from uft_ds.streams.stored_names import stored_parameters
from uft_ds.training.samples import Prompt, check_samples, choose_prompts, longest_prompt
from uft_ds.training.steps import mixed_sources


def prepare_data(
    settings: Settings, chat: ChatTokenizer, on_progress: OnProgress = lambda label, done, total: None
) -> PreparedData:
    """Read, check and tokenise all sources. A source whose tokens are in the cache is only hashed.

    Raises:
        UserError: a source is not there, cannot be read, or does not fit the objective or the micro-batch, or the
            mixture is empty.
    """
    sources = (*settings.data.sources, *settings.data.held_out)
    # All of them before the first is tokenised, which may take an hour.
    found = [find_data(source.path, source.split, source.path_key) for source in sources]

    def prepare(source: SourceSettings, files: SourceFiles) -> PreparedSource:
        return prepare_source(
            source,
            chat,
            settings.data.cache_dir,
            seed=settings.train.seed,
            tolerance=settings.data.tolerance,
            workers=settings.data.workers,
            files=files,
            on_progress=lambda done, total: on_progress(f"reading {source.label}", done, total),
        )

    prepared, num_train = tuple(map(prepare, sources, found)), len(settings.data.sources)
    data = PreparedData(prepared[:num_train], prepared[num_train:])
    check_no_source_twice(data, settings.data.cache_dir)
    problems = list(kind_problems(settings.given, data))
    if problems:
        raise UserError("\n".join(f"objective.{key}: {problem}" for key, problem in problems))
    tokens, together = settings.train.tokens_per_micro_batch, settings.launch.sequence_parallel
    check_units_fit(data, tokens, together, max_length=settings.data.max_length)
    _check_mixture(settings, data)
    return data


def prepare_fitting_data(
    settings: Settings, on_progress: OnProgress = lambda label, done, total: None
) -> tuple[ChatTokenizer, PreparedData]:
    """As `prepare_data`; the tokenizer and all tokens must fit the base's embedding. No weights are read.

    Raises:
        UserError: as `prepare_data`; or the base has no config, or a token is beyond its embedding.
    """
    model = settings.model
    config = check_base(model.base, model.revision)
    rows, chat = embedding_rows(config), data_tokenizer(model, config)
    check_fits_embedding(chat, rows)
    data = prepare_data(settings, chat, on_progress)
    check_fits_embedding(chat, rows, (source.selection.store.token_ids for source in data.all))
    return chat, data


def open_data(settings: Settings, folder: RunFolder) -> PreparedData:
    """Open the data that `prepare_run` recorded in the run's folder.

    Raises:
        UserError: the record cannot be read, or is of other sources than the settings'.
    """
    report = read_report(folder)

    def opened(part: str, sources: tuple[SourceSettings, ...]) -> tuple[PreparedSource, ...]:
        if len(report[part]) != len(sources):
            raise UserError(
                f"{folder.data_report()}: {len(report[part])} sources of {part} found, the recipe has {len(sources)}; "
                "bring recipe.yaml and data/ back from one copy of the run"
            )
        cache_dir, seed = settings.data.cache_dir, settings.train.seed
        return tuple(
            open_source(source, cache_dir, row["tokens_key"], tuple(row["files"]), seed=seed)
            for row, source in zip(report[part], sources, strict=True)
        )

    return PreparedData(opened("train", settings.data.sources), opened("held_out", settings.data.held_out))


def ensure_data(settings: Settings, folder: RunFolder, *, has_prepared: bool) -> None:
    """Tokenise on this machine the sources that another machine prepared and this machine's cache lacks.

    Args:
        has_prepared: whether this machine prepared them. On another one the stores that its cache has are read through.
    Raises:
        UserError: the data, the tokenizer or the installed versions differ from those of the preparing machine, or a
            store in the cache has changed since it was written.
    """
    report = read_report(folder)
    keys = {row["tokens_key"] for part in ("train", "held_out") for row in report[part]}
    missing = {key for key in keys if not is_whole(settings.data.cache_dir / key)}
    if not has_prepared:
        for key in sorted(keys - missing):
            check_content(settings.data.cache_dir / key)
    if not missing:
        return
    chat = data_tokenizer(settings.model, check_base(settings.model.base, settings.model.revision))
    here = {source.key: source.label for source in prepare_data(settings, chat).all}
    if keys - set(here):
        other = sorted(set(here) - keys)
        raise UserError(
            f"{here[other[0]] if other else settings.data.sources[0].path}: on {platform.node()} its content, the "
            "tokenizer or the installed versions are not those of the machine that prepared the run; make them the same"
        )


def read_report(folder: RunFolder) -> dict[str, list[dict[str, Any]]]:
    """The rows of `data_report` as `prepare_run` wrote them, by part: train and held_out.

    Raises:
        UserError: the file cannot be read, or lacks the tokens or the files of a source.
    """
    path = folder.data_report()
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        rows = {part: list(report[part]) for part in ("train", "held_out")}
        has_keys = all(
            isinstance(row["tokens_key"], str) and isinstance(row["files"], list)
            for part in rows.values()
            for row in part
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}): bring it back from a copy of the run, or start the run anew"
        ) from None
    except (KeyError, TypeError, AttributeError, RecursionError):
        has_keys = False
    if not has_keys:
        raise UserError(
            f"{path}: expected train and held_out, each a list of sources with tokens_key and files; the file is "
            "damaged: bring it back from a copy of the run, or start the run anew"
        )
    return rows


def _check_mixture(settings: Settings, data: PreparedData) -> None:
    """Refuse a mixture from which no step can be made."""
    # With train.steps the mixture is repeated until it fills them: an empty pass would loop forever.
    epochs = 1 if settings.train.steps is not None else settings.train.epochs
    try:
        is_empty = units_of_epochs(mixed_sources(settings, data), epochs) == 0
    except ValueError as error:
        raise UserError(f"data.sources: {error}") from None
    if not is_empty:
        return
    lines = []
    given = settings.stored["data"]["sources"]
    for number, (entry, amount) in enumerate(zip(given, data.epoch_amounts, strict=True)):
        key = "epochs" if entry["share"] is None else "share"
        found = data.train[number].num_responses
        lines.append(f"data.sources.{number}.{key}: {entry[key]} given, which takes {amount:.3g} of {found} responses")
    total = f"{sum(data.epoch_amounts):.3g} responses{'' if epochs == 1 else f' an epoch, of {epochs}'}"
    raise UserError(
        "\n".join(lines) + f"\nthe mixture holds {total}: less than half a row of each source (answers to one prompt "
        "that are drawn together count as one row), so no step can be made; "
        f"a step takes {settings.train.examples_per_step} (train.examples_per_step), the last one at least 1; raise "
        "the number above"
    )


def prepare_run(
    settings: Settings,
    *,
    overwrite: bool,
    on_progress: OnProgress = lambda label, done, total: None,
    lock: Lock | None = None,
) -> tuple[RunFolder, PreparedData, Lock]:
    """Check everything, then claim the run's folder and write the data report and the run's identity there.

    Args:
        settings: as returned by `located`, because they are stored with the run.
        lock: the folder's lock if the caller has already claimed the folder.
    Returns:
        The folder, the prepared data, and the folder's lock.
    Raises:
        UserError: a check failed; nothing has been written to the folder.
    """
    folder = RunFolder(settings.output)
    settings, data, identity, start = check_prepare(settings, overwrite=overwrite, on_progress=on_progress)
    tasks = task_identities(settings)
    lock = claim(folder, overwrite=overwrite, lock=lock)
    try:
        _write_prepared(folder, settings, data, identity)
        write_task_identities(folder, tasks)
        if start is not None:
            write_start(folder, start)
    except BaseException as error:
        release(folder, lock)
        if isinstance(error, OSError):
            raise UserError(f"output: {folder.path} cannot be written ({error.strerror})") from None
        raise
    return folder, data, lock


def check_prepare(
    settings: Settings, *, overwrite: bool, on_progress: OnProgress = lambda label, done, total: None
) -> tuple[Settings, PreparedData, dict[str, Any], Start | None]:
    """All checks of `prepare_run`; the run's folder is not touched.

    Returns:
        What `check_run` returns, the run's identity, and what its policy must compute before the first step.
    Raises:
        UserError: a check failed.
    """
    check_claimable(RunFolder(settings.output), overwrite=overwrite)
    settings, data = check_run(settings, on_progress)
    return settings, data, run_identity(settings, data, on_progress), start_of(settings, data, on_progress)


def check_run(
    settings: Settings, on_progress: OnProgress = lambda label, done, total: None
) -> tuple[Settings, PreparedData]:
    """Check settings against their model and data, and tokenise the data; the run's folder is not touched.

    Returns:
        The settings, completed with the DeepSpeed file's content and a hub model's commit, and the data.
    """
    check_inputs_lie_outside(settings)
    settings = with_deepspeed_file(settings)
    adapted = check_recipe(settings)
    settings = with_fixed_revision(settings)
    base = local_folder(settings.model.base, settings.model.revision)
    model, stored = check_base_files(base, adapted)
    if settings.model.quantization is not None:
        stored_in_nf4(base, model, stored, check_can_be_nf4(model))
    if settings.trains_all:
        stored_parameters(base, model, stored)  # so that the trained model can be written
    find_tasks(settings)
    chat, data = prepare_fitting_data(settings, on_progress)
    if settings.trains_head:
        check_classifier(check_base(settings.model.base, settings.model.revision), model, stored)
        padding_id(chat)
    if settings.train.samples:
        config = check_base(settings.model.base, settings.model.revision)
        check_samples(settings.train, config, prompts_of(settings, data, config))
    check_online(settings, data)
    check_tasks(settings, chat)
    check_adapters_are_of_base(settings, partial(on_progress, "hashing the adapter's base"))
    reward = reward_model_of(settings)
    if reward is not None:
        check_reads_the_same_text(reward, chat)
    return settings, data


def find_tasks(settings: Settings) -> None:
    """Refuse tasks whose prompts are not there, before any data is tokenised.

    Raises:
        UserError: names the task's key.
    """
    for number, task in enumerate(settings.tasks):
        find_data(task.path, task.split, f"evaluate.tasks.{number}.path")


def prompts_of(settings: Settings, data: PreparedData, config: Any) -> tuple[Prompt, ...]:
    """The held-out prompts that the policy answers while it is trained. config: of the base."""
    pools = [source.selection for source in data.held_out]
    return choose_prompts(pools, settings.train.samples, longest_prompt(settings.train, config))


def _write_prepared(folder: RunFolder, settings: Settings, data: PreparedData, identity: dict[str, Any]) -> None:
    folder.sample_data().mkdir(parents=True, exist_ok=True)
    write_sample_of(data, folder.sample_data())
    if any(source.account.quarantined for source in data.all):
        with folder.quarantine().open("wb") as file:
            for rejected in dict.fromkeys(source.quarantine_file for source in data.all):
                file.write(rejected.read_bytes())
    write_atomically(folder.data_report(), json.dumps(data_report(data), indent=2) + "\n")
    recorded = {RUN: asdict(owner(settings, identity)), **identity}
    write_atomically(folder.identity, json.dumps(recorded, indent=2) + "\n")
    write_atomically(folder.environment, json.dumps(environment(settings), indent=2) + "\n")
    write_atomically(folder.recipe, stored_recipe(settings.stored))


def data_report(data: PreparedData) -> dict[str, list[dict[str, object]]]:
    """Per source: its counts, its drop statistics and its tokens' key, as plain values for JSON.

    left_out, changed: number of responses of the whole source by reason; places: up to three for each reason.
    """

    def row(source: PreparedSource, per_epoch: float) -> dict[str, object]:
        selection, account = source.selection, source.account
        return {
            "source": source.label,
            "score_range": source.settings.rules.score_range,
            "scores_found": account.scores and [account.scores.low, account.scores.high],
            "score_map": source.settings.score_map,
            "responses": source.num_responses,
            "responses_of_kind": selection.responses_of_kind,
            "sequences": selection.num_sequences,
            "tokens": selection.num_tokens,
            "responses_per_epoch": per_epoch,
            "rows": account.rows,
            "rows_not_selected": account.skipped,
            "rows_quarantined": account.quarantined,
            "columns_not_read": account.unread,
            "left_out": account.dropped,
            "changed": account.changed,
            "places": {reason: selection.store.places_of(reason) for reason in account.places},
            "files": source.names,
            "tokens_key": source.key,
        }

    return {
        "train": [row(source, amount) for source, amount in zip(data.train, data.epoch_amounts, strict=True)],
        "held_out": [row(source, source.num_responses) for source in data.held_out],
    }
