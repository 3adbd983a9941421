"""All steps of a run, from its settings and its prepared data."""

from __future__ import annotations

from types import MappingProxyType

from uft_ds.data.asked import AskedSource
from uft_ds.data.mixture import SHORT_AFTER, MixedSource, Steps, plan_steps
from uft_ds.data.source import SourceState
from uft_ds.data.sources import PreparedData, PreparedSource
from uft_ds.data.together import TogetherSource
from uft_ds.recipe.settings import Settings


def steps_of(settings: Settings, data: PreparedData, state: SourceState = MappingProxyType({})) -> Steps:
    """All steps of a run.

    Args:
        state: of the source of steps, as in the checkpoint that the run resumes from.
    """
    return plan_steps(
        mixed_sources(settings, data),
        seed=settings.train.seed,
        examples_per_step=settings.train.examples_per_step,
        epochs=settings.train.epochs,
        steps=settings.train.steps,
        short_after=frozenset(state.get(SHORT_AFTER, ())),
    )


def mixed_sources(settings: Settings, data: PreparedData) -> tuple[MixedSource, ...]:
    """The training sources as the mixture draws from them: answers to one prompt together, unless told otherwise."""
    return tuple(_mixed(settings, source) for source in data.train)


def _mixed(settings: Settings, source: PreparedSource) -> MixedSource:
    if source.settings.asked is not None:
        return AskedSource.of(source)
    if not settings.data.share_prompts:
        return source
    return TogetherSource.of(source, settings.train.examples_per_step)
