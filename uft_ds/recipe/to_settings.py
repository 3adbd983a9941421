"""From a recipe to the settings of its run. The disk is not read, but for the recipe itself."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

from uft_ds.data.example import KINDS
from uft_ds.data.formats.table import PROMPTS
from uft_ds.data.mixture import Portion
from uft_ds.data.sources import AskedSettings, ScoreMapping, SourceSettings, Tolerance
from uft_ds.data.store.building import RowRules
from uft_ds.objectives.objective import KindObjective, Objective
from uft_ds.objectives.pairwise import PairConstants
from uft_ds.objectives.reward_shift import RewardShift
from uft_ds.recipe.file import load_recipe, recipe_from_tree
from uft_ds.recipe.online import ScoreBySection
from uft_ds.recipe.rules import GivenObjective
from uft_ds.recipe.schema import DataSection, Recipe, SourceSection, TrainSection
from uft_ds.recipe.settings import (
    DataSettings,
    DeepSpeedSettings,
    GeneratorSettings,
    JudgeSettings,
    LaunchSettings,
    LoraSettings,
    ModelSettings,
    ReferenceSettings,
    ScorerSettings,
    Settings,
    TaskSettings,
    TrainSettings,
)
from uft_ds.recipe.tasks import TaskSection


def load_settings(name_or_path: str, overrides: tuple[str, ...] = ()) -> Settings:
    """The settings of a shipped recipe or of a recipe file.

    Raises:
        UserError: names the recipe and the key, what was given, what is allowed and the nearest known name.
    """
    return settings_of(load_recipe(name_or_path, overrides))


def settings_of(recipe: Recipe) -> Settings:
    """The settings of a recipe."""
    model, lora, reference, data = recipe.model, recipe.lora, recipe.reference, recipe.data
    given = recipe.objective.given
    longest_answer = recipe.generator.max_new_tokens

    def sources_of(part: str, entries: list[SourceSection]) -> tuple[SourceSettings, ...]:
        return tuple(
            source_of(entry, data, longest_answer, f"data.{part}.{number}") for number, entry in enumerate(entries)
        )

    sources = sources_of("sources", data.sources)
    objective = objective_of(given)
    return Settings(
        name=recipe.name,
        output=Path(recipe.output),
        model=ModelSettings(
            base=model.base,
            revision=model.revision,
            dtype=model.dtype,
            quantization=model.quantization,
            attention=model.attention,
            chat_template=model.chat_template,
            gradient_checkpointing=model.gradient_checkpointing,
            activation_offload=model.activation_offload,
            logits_bytes=None if model.logits_mib is None else model.logits_mib * 2**20,
        ),
        lora=None if lora is None else LoraSettings(lora.rank, lora.alpha, lora.targets, lora.dtype, lora.experts),
        data=DataSettings(
            max_length=data.max_length,
            tolerance=Tolerance(data.on_bad_row == "quarantine", data.max_quarantined, data.too_long != "refuse"),
            workers=data.workers,
            given_cache_dir=data.cache_dir,
            share_prompts=data.share_prompts,
            sources=sources,
            held_out=sources_of("held_out", data.held_out),
        ),
        objective=objective,
        given=given,
        reference=ReferenceSettings(
            is_needed=objective.needs_reference,
            # Without adapters the reference is forwarded by itself: with the base's weights before the first step, or
            # with those of a copy.
            given_mode="separate" if lora is None else reference.mode,
            # The policy never gives the same answer again, so a cache of its log-probs would only grow.
            given_cache=reference.cache and not any(source.asked is not None for source in sources),
            given_cache_dir=reference.cache_dir,
            adapter=reference.adapter,
            step_zero_tolerance=reference.step_zero_tolerance,
        ),
        start_adapter=recipe.start.adapter,
        generator=GeneratorSettings(**recipe.generator.model_dump()),
        scorers=tuple(None if entry.score_by is None else _scorer_of(entry.score_by) for entry in data.sources),
        tasks=tuple(_task_of(entry) for entry in recipe.evaluate.tasks),
        train=train_settings(recipe.train),
        launch=LaunchSettings(**recipe.launch.model_dump()),
        tracking=tuple(recipe.tracking),
        deepspeed=DeepSpeedSettings(recipe.deepspeed),
        stored=recipe.model_dump(mode="json"),
    )


def changed(settings: Settings, changes: Mapping[str, Any]) -> Settings:
    """The settings of the same recipe with other values at these keys.

    The objective as the recipe gives it is kept, and so is the DeepSpeed configuration if its name does not change.
    Combinations of keys are not checked again: two spellings of one path may become equal. Such a source is refused
    by its content when the data is read, unless each `where` takes other rows, which the recipe allows of one path.
    """
    tree: Any = deepcopy(dict(settings.stored))
    for key, value in changes.items():
        *parents, leaf = key.split(".")
        node = tree
        for part in parents:
            node = node[int(part)] if isinstance(node, list) else node[part]
        node[leaf] = value
    made = settings_of(recipe_from_tree(tree, settings.name, checks_combinations=False))
    is_same_file = made.deepspeed.name == settings.deepspeed.name
    return replace(made, given=settings.given, deepspeed=settings.deepspeed if is_same_file else made.deepspeed)


def train_settings(section: TrainSection) -> TrainSettings:
    """The same values as frozen settings."""
    first, second = section.betas
    return TrainSettings(**section.model_dump() | {"betas": (first, second)})


def objective_of(given: GivenObjective) -> Objective:
    """The objective: losses, weights and betas of each kind, and the constants that all kinds share."""
    return Objective(
        {kind: KindObjective(given.losses_of(kind), given.weight_of(kind), given.beta_of(kind)) for kind in KINDS},
        shift=RewardShift(given.reward_shift, given.reward_shift_value, given.reward_shift_decay),
        center=given.center,
        length_normalized=given.length_normalized,
        undesirable_weight=given.undesirable_weight,
        beta_schedule=given.beta_schedule,
        beta_end=given.beta_end,
        constants=PairConstants(
            label_smoothing=given.label_smoothing or 0.0,
            rpo_scale=given.rpo_scale,
            dpop_penalty=given.dpop_penalty,
            simpo_margin=given.simpo_margin,
            score_margin=given.margin == "scores",
            centering=given.centering,
        ),
        reward=given.reward,
    )


def _task_of(section: TaskSection) -> TaskSettings:
    return TaskSettings(
        section.name,
        section.path,
        section.split,
        tuple(sorted(section.columns.items())),
        section.examples,
        _scorer_of(section.score_by),
        section.max_new_tokens,
    )


def _scorer_of(section: ScoreBySection) -> ScorerSettings:
    judge = section.judge
    return ScorerSettings(
        section.by,
        section.map,
        section.seconds,
        section.workers,
        None
        if judge is None
        else JudgeSettings(
            **judge.model_dump() | {"scale": _two(judge.scale), "price": judge.price and _two(judge.price)}
        ),
    )


def _two(values: list[float]) -> tuple[float, float]:
    first, second = values
    return first, second


def source_of(entry: SourceSection, data: DataSection, longest_answer: int, key: str) -> SourceSettings:
    """The settings of one source, including the rules that it shares with the other sources.

    Args:
        longest_answer: `generator.max_new_tokens`, for which the prompts of an online source leave room.
        key: of the entry, such as data.sources.0.
    """
    is_online = entry.format == PROMPTS
    rules = RowRules(
        entry.format,
        entry.score,
        max_length=data.max_length - (longest_answer if is_online else 0),
        merge=data.merge_conversations,
        trim_prompt=data.too_long == "trim_prompt",
        split_pairs=entry.pairs == "split",
        where=tuple(sorted(entry.where.items())),
        columns=tuple(sorted(entry.columns.items())),
        score_range=None if entry.score_range is None else (entry.score_range[0], entry.score_range[1]),
        mixed_kinds=entry.mixed_kinds,
    )
    return SourceSettings(
        entry.path,
        entry.split,
        rules,
        entry.examples,
        portion_of(entry),
        entry.allow_one_score or is_online,
        _score_mapping(entry),
        AskedSettings(entry.answers, longest_answer) if is_online and entry.answers is not None else None,
        key,
    )


def portion_of(entry: SourceSection) -> Portion:
    """How much of a source one epoch of the mixture takes."""
    if entry.share is None:
        return Portion(entry.epochs or 1.0)
    schedule = entry.share if isinstance(entry.share, list) else [[0.0, entry.share]]
    return Portion(share=tuple((progress, share) for progress, share in schedule))


def _score_mapping(entry: SourceSection) -> ScoreMapping:
    if not isinstance(entry.score_map, list):
        return entry.score_map
    scale, offset = entry.score_map
    return scale, offset
