"""Find settings of a recipe that have no effect with its data.

They are reported and not refused, because a sweep or a shared recipe may hold more than one run needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from uft_ds.data.example import GOOD_FROM, Kind
from uft_ds.data.sources import PreparedData, PreparedSource
from uft_ds.objectives.losses import OF_HEAD, POINTWISE, READS_SCORES, USES_BETA
from uft_ds.recipe.rules import DEFAULT_BETA, GivenObjective


def unused(objective: GivenObjective, data: PreparedData) -> Iterator[str]:
    """One message for each setting without effect; each begins with its key."""
    held = sorted({kind for source in data.all for kind in source.selection.kinds})
    used = {name for kind in held for name in objective.losses_of(kind)}
    has_beta = objective.reward == "implicit"  # a recipe with a reward head and a beta has been refused
    for key in ("loss", "beta", "weights"):
        given = getattr(objective, key)
        for kind, value in given.items() if isinstance(given, Mapping) else ():
            if kind not in held:
                yield f"objective.{key}.{kind}: {value} given, but no source holds responses of kind {kind!r}"
            elif key == "beta" and not USES_BETA & objective.losses_of(kind).keys():
                names = ", ".join(sorted(objective.losses_of(kind)))
                yield f"objective.beta.{kind}: {value} given, but {names} has no beta"
    reads_beta = used & USES_BETA
    if not isinstance(objective.beta, Mapping) and objective.beta != DEFAULT_BETA and not reads_beta:
        yield f"objective.beta: {objective.beta} given, but {', '.join(sorted(used))} has no beta"
    if objective.beta_schedule != "constant" and not reads_beta:
        yield f"objective.beta_schedule: {objective.beta_schedule} given, but {', '.join(sorted(used))} has no beta"
    if has_beta:
        yield from _of_defaults(objective, held)
    if objective.undesirable_weight != 1.0 and not (
        "binary" in held and set(POINTWISE) & objective.losses_of("binary").keys()
    ):
        given = objective.undesirable_weight
        why = "has no pointwise loss" if "binary" in held else "is held by no source"
        yield f"objective.undesirable_weight: {given} given, but kind 'binary', which it is for, {why}"
    yield from _of_shift(objective, data)
    for part, sources in (("sources", data.train), ("held_out", data.held_out)):
        for number, source in enumerate(sources):
            yield from (f"data.{part}.{number}.{text}" for text in _of_source(objective, source))


def _of_defaults(objective: GivenObjective, held: list[Kind]) -> Iterator[str]:
    """Messages for losses that use the default beta, which UFT found for its squared error only."""
    if "beta" in objective.named and not isinstance(objective.beta, Mapping):
        return
    # The squared error is exempt: the default was found for it.
    for kind in held:
        others = sorted(USES_BETA & objective.losses_of(kind).keys() - {"mse"})
        if (
            isinstance(objective.beta, Mapping)
            and kind not in objective.beta
            and USES_BETA & objective.losses_of(kind).keys()
        ):
            yield f"objective.beta: not given for {kind}, which has the default {DEFAULT_BETA}"
        elif not isinstance(objective.beta, Mapping) and others:
            yield f"objective.beta: not given; {others[0]} has the default {DEFAULT_BETA}, which is UFT's own"


def _of_shift(objective: GivenObjective, data: PreparedData) -> Iterator[str]:
    kinds = {kind for source in data.train for kind in source.selection.kinds}
    if objective.center != "none" and not any(
        set(POINTWISE) & objective.losses_of(kind).keys() for kind in kinds - {"instruction"}
    ):
        yield f"objective.center: {objective.center} given, but nothing is trained on that has scores to compare"
    shift = objective.reward_shift
    if shift == "none":
        return
    pointwise = [source for source in data.train if _losses(objective, source) & set(POINTWISE)]
    if not pointwise:
        yield f"objective.reward_shift: {shift} given, but no training source has a pointwise loss; others ignore it"
    elif (
        shift == "kl"
        and all("l1" in _losses(objective, source) for source in pointwise)
        and all(_lowest_score(source) >= GOOD_FROM for source in pointwise)
    ):
        yield f"objective.reward_shift: kl (KTO) given, but no response is undesirable (a score below {GOOD_FROM})"


def _of_source(objective: GivenObjective, source: PreparedSource) -> Iterator[str]:
    score, score_map = source.settings.rules.score, source.settings.score_map
    if score is not None and "instruction" not in source.selection.kinds:
        kinds = ", ".join(sorted(source.selection.kinds))
        yield f"score: {score} given, which is for rows of kind 'instruction'; {source.label} holds {kinds}"
    if source.settings.rules.mixed_kinds and len(found := source.selection.kinds) == 1 and not _may_have_pairs(source):
        yield f"mixed_kinds: true given, but all rows are of kind {next(iter(found))!r}"
    if source.settings.rules.score_range is not None and source.account.scores is None:
        yield f"score_range: {_as_list(source.settings.rules.score_range)} given, but no row has a score"
    losses = _losses(objective, source)
    reads_scores = losses & READS_SCORES or (objective.margin == "scores" and losses & set(OF_HEAD))
    if score_map is not None and not reads_scores:
        given = score_map if isinstance(score_map, str) else _as_list(score_map)
        yield f"score_map: {given} given, but {', '.join(sorted(losses))} reads no scores"


def _may_have_pairs(source: PreparedSource) -> bool:
    """Whether rows may be pairs: with scores and without they are two kinds, of which the tokens tell nothing."""
    return source.settings.rules.split_pairs or "pair" in source.selection.kinds


def _as_list(values: tuple[float, float]) -> str:
    return f"[{values[0]:g}, {values[1]:g}]"


def _losses(objective: GivenObjective, source: PreparedSource) -> set[str]:
    kinds: set[Kind] = source.selection.kinds
    return {name for kind in kinds for name in objective.losses_of(kind)}


def _lowest_score(source: PreparedSource) -> float:
    lowest = float(source.selection.scores_R.min())
    return lowest if source.selection.score_map is None else source.selection.score_map(lowest)
