"""Complete settings with what needs the disk or the hub: absolute paths, the DeepSpeed file, a hub model's commit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from uft_ds.checkpoint.folder import latest_checkpoint
from uft_ds.checkpoint.manifest import MANIFEST
from uft_ds.checkpoint.state import claims_of, has_adapter
from uft_ds.errors import UserError
from uft_ds.recipe.settings import ScorerSettings, Settings
from uft_ds.recipe.to_settings import changed
from uft_ds.streams.identity import local_folder


def located(settings: Settings) -> Settings:
    """Settings with absolute local paths, independent of the working directory; hub and shipped names stay unchanged.

    A run given as `reference.adapter`, `start.adapter` or `score_by: reward:RUN` is replaced by its present newest
    checkpoint, because that may change later.

    Raises:
        UserError: the adapter does not exist.
    """

    def absolute(path: str) -> str:
        return str(Path(path).absolute()) if Path(path).exists() else path

    model, reference, name = settings.model, settings.reference, settings.deepspeed.name
    changes: dict[str, Any] = {
        "model.base": absolute(model.base),
        "model.chat_template": absolute(model.chat_template) if model.chat_template else None,
        **{
            key: str(adapter_folder(given, key).absolute()) if given else None
            for key, given in (("reference.adapter", reference.adapter), ("start.adapter", settings.start_adapter))
        },
        "deepspeed": absolute(name) if name.endswith(".json") else name,
        "output": str(settings.output.absolute()),
    }
    for key, given in (
        ("data.cache_dir", settings.data.given_cache_dir),
        ("reference.cache_dir", reference.given_cache_dir),
    ):
        changes[key] = str(Path(given).absolute()) if given else None
    given_run = settings.generator.run
    changes["generator.run"] = absolute(given_run) if given_run else None
    for number, scorer in enumerate(settings.scorers):
        if scorer is not None:
            changes |= _of_scorer(f"data.sources.{number}.score_by", scorer, absolute)
    for number, task in enumerate(settings.tasks):
        key = f"evaluate.tasks.{number}"
        changes |= {f"{key}.path": absolute(task.path)} | _of_scorer(f"{key}.score_by", task.scorer, absolute)
    for part, sources in (("sources", settings.data.sources), ("held_out", settings.data.held_out)):
        changes |= {f"data.{part}.{number}.path": absolute(source.path) for number, source in enumerate(sources)}
    return changed(settings, changes)


def _of_scorer(key: str, scorer: ScorerSettings, absolute: Callable[[str], str]) -> dict[str, Any]:
    """The paths of a scorer: a reward model's folder, a file for `isotonic`, a judge's template."""
    changes: dict[str, Any] = {}
    if scorer.by.startswith("reward:"):
        given = scorer.by.partition(":")[2]
        changes[f"{key}.by"] = f"reward:{absolute(str(_reward_folder(given, key)))}"
    if scorer.rule is not None and scorer.rule.startswith("isotonic:"):
        changes[f"{key}.map"] = f"isotonic:{absolute(scorer.rule.partition(':')[2])}"
    if scorer.judge is not None and scorer.judge.question is not None:
        changes[f"{key}.judge.question"] = absolute(scorer.judge.question)
    return changes


def _reward_folder(path: str, key: str) -> Path:
    """The folder of a reward model: `path` itself, or the adapter of a run's or checkpoint that trained one.

    Raises:
        UserError: the run has no checkpoint that can be used.
    """
    folder = Path(path)
    is_model = (folder / "config.json").is_file()
    is_run = (folder / MANIFEST).exists() or (folder / "checkpoints").is_dir()
    return adapter_folder(path, key) if is_run and not is_model else folder


def with_fixed_revision(settings: Settings) -> Settings:
    """Settings with a hub model's commit as its revision, so that the ranks load the files that are hashed here."""
    model = settings.model
    if Path(model.base).exists():
        return settings
    return changed(settings, {"model.revision": local_folder(model.base, model.revision).name})


def adapter_folder(path: str, recipe_key: str = "reference.adapter") -> Path:
    """The folder of an adapter in PEFT's format: `path` itself, or that of a checkpoint or of a run's newest one.

    Args:
        recipe_key: what messages call it.
    Raises:
        UserError: there is no adapter, or the checkpoint is damaged.
    """
    folder = Path(path)
    if (folder / "adapter_config.json").is_file():
        return folder
    expected = "expected an adapter's folder (with adapter_config.json), a checkpoint or a run"
    if not folder.is_dir():
        raise UserError(f"{recipe_key}: {path}: {'not a' if folder.exists() else 'no such'} folder; {expected}")
    if not (folder / MANIFEST).exists() and not (folder / "checkpoints").is_dir():
        raise UserError(f"{recipe_key}: {path}: holds no adapter; {expected}")
    try:
        checkpoint = latest_checkpoint(folder)
    except UserError as error:
        raise UserError(f"{recipe_key}: {error}") from None
    if not has_adapter(claims_of(checkpoint)):
        raise UserError(
            f"{recipe_key}: {path}: all parameters were trained, so it holds no adapter; write the model by "
            "`uft convert`, and take it as model.base"
        )
    return checkpoint / "adapter"
