"""What a recipe means, as the plain values that everything below the builders takes."""

from __future__ import annotations

from pathlib import Path

from uft_ds.checkpoint.folder import latest_checkpoint
from uft_ds.checkpoint.manifest import MANIFEST
from uft_ds.data.example import KINDS
from uft_ds.data.mixture import Portion
from uft_ds.data.sources import ScoreMapping, Source, Tolerance
from uft_ds.data.store.building import RowRules
from uft_ds.errors import UserError
from uft_ds.host.files import user_cache
from uft_ds.objectives.objective import KindObjective, Objective
from uft_ds.objectives.pairwise import PairConstants
from uft_ds.objectives.reward_shift import RewardShift
from uft_ds.recipe.schema import Recipe, SourceSection
from uft_ds.streams.identity import local_folder
from uft_ds.streams.model import ReferenceMode


def source_of(recipe: Recipe, entry: SourceSection) -> Source:
    """A recipe's entry as plain values."""
    rules = RowRules(
        entry.format,
        entry.score,
        max_length=recipe.data.max_length,
        merge=recipe.data.merge_conversations,
        trim_prompt=recipe.data.too_long == "trim_prompt",
        split_pairs=entry.pairs == "split",
        where=tuple(sorted(entry.where.items())),
    )
    return Source(
        entry.path,
        entry.split,
        rules,
        entry.examples,
        portion_of(entry),
        entry.allow_one_score,
        score_mapping_of(entry),
    )


def score_mapping_of(entry: SourceSection) -> ScoreMapping:
    """What becomes of a source's scores."""
    if not isinstance(entry.score_map, list):
        return entry.score_map
    scale, offset = entry.score_map
    return scale, offset


def portion_of(entry: SourceSection) -> Portion:
    """How much of a source an epoch of the mixture takes."""
    if entry.share is None:
        return Portion(entry.epochs or 1.0)
    schedule = entry.share if isinstance(entry.share, list) else [[0.0, entry.share]]
    return Portion(share=tuple((progress, share) for progress, share in schedule))


def tolerance_of(recipe: Recipe) -> Tolerance:
    """What sources may lack."""
    data = recipe.data
    return Tolerance(data.on_bad_row == "quarantine", data.max_quarantined, data.too_long != "refuse")


def objective_of(recipe: Recipe) -> Objective:
    """The recipe's losses, weights and betas, kind by kind, and what they share."""
    section = recipe.objective
    return Objective(
        {kind: KindObjective(recipe.losses_of(kind), recipe.weight_of(kind), recipe.beta_of(kind)) for kind in KINDS},
        shift=RewardShift(section.reward_shift, section.reward_shift_value, section.reward_shift_decay),
        length_normalized=section.length_normalized,
        undesirable_weight=section.undesirable_weight,
        beta_schedule=section.beta_schedule,
        beta_end=section.beta_end,
        constants=PairConstants(
            label_smoothing=section.label_smoothing or 0.0,
            rpo_scale=section.rpo_scale,
            dpop_penalty=section.dpop_penalty,
            simpo_margin=section.simpo_margin,
        ),
    )


def reference_mode(recipe: Recipe) -> ReferenceMode:
    """How the reference is forwarded; where none is, the model is left as it is."""
    return recipe.reference.mode if objective_of(recipe).needs_reference else "separate"


def caches_reference(recipe: Recipe) -> bool:
    """Whether the reference is needed, and remembered."""
    return recipe.reference.cache and objective_of(recipe).needs_reference


def cache_dir(recipe: Recipe) -> Path:
    """Where runs share what they compute of the reference."""
    return Path(recipe.reference.cache_dir) if recipe.reference.cache_dir else user_cache() / "reference"


def tokenized_dir(recipe: Recipe) -> Path:
    """Where runs share tokenised sources."""
    return Path(recipe.data.cache_dir) if recipe.data.cache_dir else user_cache() / "tokenized"


def adapter_folder(path: str) -> Path:
    """The folder of an adapter in PEFT's format: itself, or the one that a checkpoint or a run's newest one holds.

    Raises:
        UserError: there is none, or the checkpoint is damaged.
    """
    folder = Path(path)
    if (folder / "adapter_config.json").is_file():
        return folder
    expected = "expected an adapter's folder (with adapter_config.json), a checkpoint or a run"
    if not folder.is_dir():
        raise UserError(f"reference.adapter: {path}: {'not a' if folder.exists() else 'no such'} folder; {expected}")
    if not (folder / MANIFEST).exists() and not (folder / "checkpoints").is_dir():
        raise UserError(f"reference.adapter: {path}: holds no adapter; {expected}")
    try:
        return latest_checkpoint(folder) / "adapter"
    except UserError as error:
        raise UserError(f"reference.adapter: {error}") from None


def with_fixed_revision(recipe: Recipe) -> Recipe:
    """A hub model by its commit: what is hashed here must be what the ranks load."""
    if Path(recipe.model.base).exists():
        return recipe
    commit = local_folder(recipe.model.base, recipe.model.revision).name
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"revision": commit})})


def with_absolute_paths(recipe: Recipe) -> Recipe:
    """The same recipe wherever it is read from: local paths made absolute, hub and shipped names left alone."""

    def absolute(path: str) -> str:
        return str(Path(path).absolute()) if Path(path).exists() else path

    def sources(entries: list[SourceSection]) -> list[SourceSection]:
        return [entry.model_copy(update={"path": absolute(entry.path)}) for entry in entries]

    template = recipe.model.chat_template
    model = {"base": absolute(recipe.model.base), "chat_template": absolute(template) if template else None}
    tokens = recipe.data.cache_dir
    data = {
        "sources": sources(recipe.data.sources),
        "held_out": sources(recipe.data.held_out),
        "cache_dir": str(Path(tokens).absolute()) if tokens else None,
    }
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
