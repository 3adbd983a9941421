"""Online sources in a run: what is checked before the launch, and the source of steps that each rank builds."""

from __future__ import annotations

from pathlib import Path

import torch

from uft_ds.data.mixture import Steps
from uft_ds.data.pool import Pool
from uft_ds.data.sources import PreparedData
from uft_ds.data.tokens.chat_tokenizer import ChatTokenizer
from uft_ds.data.tokens.tokenize import load_tokenizer
from uft_ds.engine.engine import Engine
from uft_ds.errors import UserError
from uft_ds.evaluation.generate import decode
from uft_ds.host.signals import Stop, StopRequest
from uft_ds.recipe.settings import ScorerSettings, Settings
from uft_ds.record.report import Reporter
from uft_ds.record.run_folder import RunFolder, reading_identity
from uft_ds.rollouts.prompts import read_prompts
from uft_ds.rollouts.record import RecordFolder
from uft_ds.rollouts.scorers import RewardMap, SourceScorer, check_scorer
from uft_ds.rollouts.scoring import StepScoring
from uft_ds.rollouts.source import Live, Replayed, Rollouts, Rules
from uft_ds.rollouts.stream_scorer import StreamScorer
from uft_ds.run.generators import check_server, generator_of
from uft_ds.run.reward_stream import reward_model_of
from uft_ds.streams.model import UFTModel
from uft_ds.training.steps import mixed_sources, steps_of


def check_online(settings: Settings, data: PreparedData) -> None:
    """Refuse what would fail after the launch: a scorer that cannot be made, prompts that are gone, a short record.

    Raises:
        UserError: names the recipe's key, or the file and line.
    """
    if not settings.is_online:
        return
    if settings.generator.by == "recorded":
        _check_recorded(settings, data, steps_of(settings, data))
        return
    for number, given in own_scorers(settings).items():
        check_scorer(given, f"data.sources.{number}.score_by")
    reward_maps_of(settings)
    for source in data.train:
        if source.settings.asked is not None:
            read_prompts(source)
    if settings.generator.by == "vllm":
        check_server(settings)


def _record_of(settings: Settings) -> RecordFolder:
    """The record of `generator.run`."""
    assert settings.generator.run is not None
    return RecordFolder(RunFolder(Path(settings.generator.run)).rollouts)


def _is_of_this_base(settings: Settings, folder: RunFolder) -> bool:
    """Whether the run that recorded the answers had this run's base, by its content and its rounding."""
    other = RunFolder(Path(str(settings.generator.run)))
    if not other.identity.exists():  # a record alone was copied
        return False
    with reading_identity(other) as theirs, reading_identity(folder) as own:
        return bool(theirs["base"] == own["base"])


def _check_recorded(settings: Settings, data: PreparedData, plan: Steps) -> None:
    """
    Raises:
        UserError: the record lacks a step in which the run asks prompts.
    """
    record = _record_of(settings)
    recorded = set(record.numbers())
    if not recorded:
        raise UserError(
            f"generator.run: {settings.generator.run}: holds no record of an online run ({record.path}); give the "
            "folder of a run with online sources"
        )
    asked = {number for number, source in enumerate(data.train) if source.settings.asked is not None}
    for n in range(len(plan)):
        if n + 1 not in recorded and any(source in asked for source, _ in plan.drawn(n)):
            raise UserError(
                f"generator.run: {settings.generator.run}: step {n + 1} is not recorded, the run has {len(plan)} "
                f"steps; set train.steps={n}"
            )


def own_scorers(settings: Settings) -> dict[int, ScorerSettings]:
    """The scorers of online sources, by the number of the source; not those that are a stream of the engine."""
    reward = reward_model_of(settings)
    return {
        number: scorer
        for number, scorer in enumerate(settings.scorers)
        if scorer is not None and (reward is None or number not in reward.sources)
    }


def reward_maps_of(settings: Settings) -> dict[int, RewardMap]:
    """How the values of the reward model on the policy's base become scores, by the number of the source.

    Raises:
        UserError: names the recipe's key.
    """
    reward = reward_model_of(settings)
    if reward is None:
        return {}
    rules = {number: scorer.rule for number, scorer in enumerate(settings.scorers) if scorer is not None}
    identity = reward.identity(settings)
    return {
        number: RewardMap(identity, rule, f"data.sources.{number}.score_by")
        for number, rule in rules.items()
        if number in reward.sources and rule is not None  # a recipe without it has been refused
    }


def build_rollouts(
    settings: Settings,
    data: PreparedData,
    folder: RunFolder,
    plan: Steps,
    engine: Engine,
    model: UFTModel,
    reporter: Reporter,
    request: StopRequest,
) -> Rollouts:
    """The source of an online run's steps. Every rank must call it."""
    chat = load_tokenizer(
        settings.model.base, revision=settings.model.revision, chat_template=settings.model.chat_template
    )
    pools: list[Pool] = [source.selection for source in mixed_sources(settings, data)]
    rules = Rules(
        settings.train.seed,
        settings.generator.max_dropped,
        getattr(torch, settings.model.dtype),
        settings.objective,
        chat.content_hash,
        settings.generator.max_kl,
    )
    record = RecordFolder(folder.rollouts)
    made_by: Live | Replayed
    if settings.generator.by == "recorded":
        made_by = Replayed(_record_of(settings), _is_of_this_base(settings, folder))  # checked before the launch
    else:
        # The scorers first: what they hold in memory, the generator cannot have.
        scoring = _scoring(settings, data, chat, request) if engine.rank == 0 else None
        generator = generator_of(settings, folder, engine, model, chat, reporter, request)
        made_by = Live(generator, scoring, _stream_scorer(settings, engine))
    return Rollouts(plan, pools, rules, made_by, record, engine, model.policy, reporter)


def _stream_scorer(settings: Settings, engine: Engine) -> StreamScorer | None:
    reward = reward_model_of(settings)
    if reward is None:
        return None
    return StreamScorer(
        engine, settings.train.tokens_per_micro_batch, frozenset(reward.sources), settings.generator.truncated
    )


def _scoring(settings: Settings, data: PreparedData, chat: ChatTokenizer, request: StopRequest) -> StepScoring:
    texts = {
        number: read_prompts(source) for number, source in enumerate(data.train) if source.settings.asked is not None
    }
    stop = Stop(request, lambda number: number).check  # rank 0 alone asks; what it raises is raised on all
    return StepScoring(
        {
            number: SourceScorer(given, f"data.sources.{number}.score_by", stop)
            for number, given in own_scorers(settings).items()
        },
        texts,
        lambda ids: decode(chat.tokenizer, list(ids)).strip(),
        settings.generator.truncated,
        chat.content_hash,
        reward_maps_of(settings),
    )
