"""Checks of a recipe against its model, files and installed packages, before any data is read."""

from __future__ import annotations

import importlib.util
import json
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

from uft_ds.checkpoint.folder import run_of_adapter
from uft_ds.engine.zero_section import check_ranks
from uft_ds.errors import UserError
from uft_ds.export.quantised import nf4_of_adapter
from uft_ds.host.packages import install_command
from uft_ds.recipe.settings import Settings
from uft_ds.record.run_folder import reading_identity
from uft_ds.run.reward_stream import further_streams, reward_model_of, with_reward_adapter
from uft_ds.streams.accept import accepted_policy, check_base_model, check_config, check_forwarded, whole_policy
from uft_ds.streams.adapters import adapted_weights, start_from_adapter, start_policy_from_adapter
from uft_ds.streams.divided import why_not_in_groups
from uft_ds.streams.identity import OnFile, base_identity
from uft_ds.streams.load import check_base, empty_base
from uft_ds.streams.model import UFTModel
from uft_ds.streams.nf4 import MARK, check_bitsandbytes, check_can_be_nf4


def check_recipe(settings: Settings) -> tuple[str, ...]:
    """Refuse settings that would fail after the launch; nothing is written, and no weights are read or downloaded.

    What the recipe and the model's config show is refused by `streams.accept`, as by a plan; the rest is of other
    folders and of this machine.

    Returns:
        The names in memory of the weights that get an adapter; none if all are trained.
    Raises:
        UserError: names the recipe's key.
    """
    config = check_base(settings.model.base, settings.model.revision)
    check_config(settings, config)
    # The same construction as after the launch, but without weights, so that errors appear now.
    base = empty_base(config)
    check_base_model(base)  # before what looks at its layers
    if settings.model.quantization is not None:
        check_can_be_nf4(base)
    if settings.trains_all:
        policy: Any = whole_policy(base)
        adapted: tuple[str, ...] = ()
    else:
        lora = settings.adapters
        policy = accepted_policy(
            base, rank=lora.rank, alpha=lora.alpha, targets=lora.targets, dtype=torch.float32, experts=lora.experts
        )
        adapted = adapted_weights(policy)
    check_forwarded(settings, policy)
    _check_folders(settings, policy)
    _check_installed(settings)
    if settings.reference.caches:
        _check_writable(settings.reference.cache_dir)
    return adapted


def _check_folders(settings: Settings, policy: Any) -> None:
    """Refuse adapters of other folders that do not fit the policy, and so what the policy forwards.

    Args:
        policy: without weights; it gets the adapters.
    Raises:
        UserError: names the key.
    """
    if settings.trains_all:
        reward = reward_model_of(settings)
        if reward is not None:
            raise UserError(
                f"{reward.key}: {reward.folder} is an adapter on the policy's base, but with lora: null the base "
                "itself is trained; give the reward model as a model of its own, which "
                "`uft convert RUN FOLDER --to reward-model` writes"
            )
        UFTModel(policy, reference_mode=settings.reference.mode)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT reads a deprecated property of transformers
        if settings.reference.adapter is not None:
            start_from_adapter(policy, Path(settings.reference.adapter))
        if settings.start_adapter is not None:
            start_policy_from_adapter(policy, Path(settings.start_adapter))
        heads = with_reward_adapter(policy, settings)
        further = further_streams(settings, heads)
        UFTModel(policy, reference_mode=settings.reference.mode, further=further, frozen_heads=heads)


def _check_installed(settings: Settings) -> None:
    """Refuse what needs a package that is not installed here.

    Raises:
        UserError: names the key, and how to install it.
    """
    if settings.model.quantization is not None:
        check_bitsandbytes()
    if settings.model.attention == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        raise UserError(f"model.attention: flash_attention_2 needs flash-attn: {install_command('gpu')}, or take auto")
    if "wandb" in settings.tracking and importlib.util.find_spec("wandb") is None:
        raise UserError(f"tracking: wandb is not installed: {install_command('wandb')}, or leave it out")


def check_sharding(settings: Settings, *, ranks: int, ranks_per_node: int | None) -> list[str]:
    """Refuse a number of ranks that does not fit the run's DeepSpeed file.

    Args:
        ranks_per_node: None if it is not known.
    Returns:
        Warnings that the user should read before the run.
    Raises:
        UserError: names the file and its key.
    """
    size = settings.launch.sequence_parallel
    problem = why_not_in_groups(ranks, size)
    if problem is not None:
        raise UserError(problem)
    zero = settings.deepspeed.checked["zero_optimization"]
    return check_ranks(zero, settings.deepspeed.name, ranks=ranks, ranks_per_node=ranks_per_node)


def check_inputs_lie_outside(settings: Settings) -> None:
    """Refuse inputs inside the run's folder, because a run may empty that folder.

    Places are compared, not names: an input may be named through a link, the output by a path with `..`. A folder of
    data must not hold the run's folder either, because it is read with everything below it.

    Raises:
        UserError: names the key, the path, and the place inside the run's folder.
    """
    data = {
        **{f"data.sources.{i}.path": source.path for i, source in enumerate(settings.data.sources)},
        **{f"data.held_out.{i}.path": source.path for i, source in enumerate(settings.data.held_out)},
        **{f"evaluate.tasks.{i}.path": task.path for i, task in enumerate(settings.tasks)},
    }
    paths = {
        "model.base": settings.model.base,
        "model.chat_template": settings.model.chat_template,
        "deepspeed": settings.deepspeed.name,
        "reference.adapter": settings.reference.adapter,
        "start.adapter": settings.start_adapter,
        "reference.cache_dir": settings.reference.given_cache_dir,
        "data.cache_dir": settings.data.given_cache_dir,
        "generator.run": settings.generator.run,
        **{
            f"data.sources.{i}.score_by": scorer.by.partition(":")[2]
            for i, scorer in enumerate(settings.scorers)
            if scorer is not None and scorer.by.startswith("reward:")
        },
        **{
            f"evaluate.tasks.{i}.score_by": task.scorer.by.partition(":")[2]
            for i, task in enumerate(settings.tasks)
            if task.scorer.by.startswith("reward:")
        },
        **data,
    }
    output = settings.output.resolve()
    for key, path in paths.items():
        inside = None if path is None else _place_inside(Path(path), settings.output, output, with_links=key in data)
        if inside is not None:
            found = "" if str(inside) == path else f" (as {inside})"
            raise UserError(
                f"output: {key} {path} lies inside {settings.output}{found}, which a run may empty; "
                "give another folder for the run"
            )
    for key, path in data.items():
        if Path(path).is_dir() and output.is_relative_to(Path(path).resolve()):
            raise UserError(
                f"output: {settings.output} lies inside {key} {path}, which is read with everything below it; "
                "give another folder for the run"
            )


def _place_inside(path: Path, output_as_given: Path, output: Path, *, with_links: bool) -> Path | None:
    """Where in the run's folder a path leads; None if it leads elsewhere.

    Args:
        output: the real place of `output_as_given`.
        with_links: look also at the links below the path.
    """
    if path.is_relative_to(output_as_given):
        return path
    if not path.exists():  # the name of a hub model, or a path that is refused later
        return None
    real = path.resolve()
    if real.is_relative_to(output):
        return real
    if not with_links:
        return None
    links = (Path(folder, name) for folder, *both in os.walk(real) for name in (*both[0], *both[1]))
    reached = (link.resolve() for link in links if link.is_symlink())
    return next((place for place in reached if place.is_relative_to(output)), None)


def check_adapters_are_of_base(settings: Settings, on_file: OnFile) -> None:
    """Refuse an adapter that was trained on another base: if the shapes agree, it would load silently.

    The adapter of a run is compared by the content of the base that the run recorded, another one by its base's name.
    A reward model that names none is refused: nothing later shows that its values are another model's.

    Raises:
        UserError: names both.
    """
    reward = reward_model_of(settings)
    adapters = {
        "reference.adapter": settings.reference.adapter,
        "start.adapter": settings.start_adapter,
        **({} if reward is None else {reward.key: str(reward.folder)}),
    }
    for key, given in adapters.items():
        if given is not None:
            is_reward = reward is not None and key == reward.key
            _check_is_of_base(key, Path(given), settings, on_file, must_name_it=is_reward)


def _check_is_of_base(key: str, folder: Path, settings: Settings, on_file: OnFile, *, must_name_it: bool) -> None:
    base, run = settings.model.base, run_of_adapter(folder)
    _check_same_rounding(key, folder, settings)
    if run is not None:
        with reading_identity(run) as identity:
            trained_on = dict(identity["base"])
        if trained_on != base_identity(
            base, settings.model.revision, on_file, quantization=settings.model.quantization
        ):
            raise UserError(
                f"{key}: {folder} is of the run {run.path}, which was trained on a base of other content than "
                f"{base} (model.base): the same adapter on other weights is another model"
            )
        return
    theirs = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
    if theirs is None and must_name_it:
        raise UserError(
            f"{key}: {folder / 'adapter_config.json'}: base_model_name_or_path is not given, so whether the reward "
            f"model was trained on {base} (model.base) is not known; add it, or give the run that trained it"
        )
    if theirs is None or theirs == base or (not Path(theirs).is_dir() and Path(theirs).name == Path(base).name):
        return
    ours = base_identity(base, settings.model.revision, on_file)
    if Path(theirs).is_dir() and base_identity(theirs, None, on_file) == ours:
        return
    raise UserError(
        f"{key}: {folder} was trained on {theirs}, model.base is {base}: the same adapter on other weights "
        "is another model (if the weights are the same, correct base_model_name_or_path in its adapter_config.json)"
    )


def _check_same_rounding(key: str, folder: Path, settings: Settings) -> None:
    """Refuse an adapter of a base in NF4 on one in 16 bits, and the reverse."""
    theirs, ours = nf4_of_adapter(folder), settings.model.quantization
    if (theirs is None) == (ours is None):
        return
    if theirs is None:
        raise UserError(
            f"{key}: {folder} was trained on a base that is not quantised, as far as is known, and model.quantization "
            f"is {ours}: the same adapter on other weights is another model; leave model.quantization out (or, if it "
            f"was trained on this base in NF4 elsewhere, say so in {folder / MARK}: "
            f'{{"quantization": "nf4", "dtype": "{settings.model.dtype}"}})'
        )
    raise UserError(
        f"{key}: {folder} was trained on its base in NF4, and model.quantization is not given: the same adapter on "
        "other weights is another model; set model.quantization: nf4, or merge the adapter (uft convert) and take the "
        "result as model.base"
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
