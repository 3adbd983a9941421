"""Rules for a recipe's objective, by itself and with its data.

They refuse missing losses, losses that cannot be combined, and keys that no loss reads. Those of losses that compare
answers with each other are in `answer_rules`. `unused` only warns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from uft_ds.data.example import KINDS, Kind
from uft_ds.objectives.losses import (
    A_TOKEN,
    HEAD_LOSSES,
    LOSSES,
    NEEDS_PAIRS,
    OF_HEAD,
    PAIRWISE,
    POINTWISE,
    POLICY_GRADIENT,
    PRESETS,
    USES_BETA,
    expanded,
)
from uft_ds.objectives.reference import RewardBy
from uft_ds.objectives.reward_shift import Center, ShiftName
from uft_ds.recipe.answer_rules import center_problems, own_answer_problems, policy_gradient_problems
from uft_ds.recipe.names import unknown_loss, unknown_name

if TYPE_CHECKING:  # at run time this would import the tokenizers, which reading a recipe does not need
    from uft_ds.data.sources import PreparedData, PreparedSource

DEFAULT_BETA = 0.01
"""Per nat of the sum over a response's tokens: the best value for the squared error in UFT's sweep."""

LOSS_NAMES = (*LOSSES, *PRESETS)

Problem = tuple[str, str]
"""(key of the objective, the problem)"""

_READ_BY: Mapping[str, frozenset[str]] = {
    "label_smoothing": frozenset({"cdpo", "robust"}),
    "rpo_scale": frozenset({"rpo_sq", "rpo_fwd", "rpo_bwd"}),
    "dpop_penalty": frozenset({"dpop"}),
    "simpo_margin": frozenset({"simpo"}),
    "margin": frozenset(OF_HEAD),
    "centering": frozenset(OF_HEAD),
    "reward_shift_value": frozenset({"constant"}),
    "reward_shift_decay": frozenset({"ema"}),
    "length_normalized": frozenset((*POINTWISE, *PAIRWISE)) - A_TOKEN,
}
"""The losses and shifts that read each key; without one of them, the key would have no effect."""


@dataclass(frozen=True)
class GivenObjective:
    """The objective exactly as the recipe gives it, so that messages can quote it.

    `to_settings.objective_of` turns it into the objective of a run.

    named: the keys that the recipe gives.
    changed: the keys whose value is not the default.
    """

    loss: str | Mapping[str, str | Mapping[str, float]]
    beta: float | Mapping[str, float]
    beta_schedule: Literal["constant", "linear", "cosine"]
    beta_end: float
    length_normalized: bool
    reward_shift: ShiftName
    reward_shift_value: float
    reward_shift_decay: float
    weights: float | Mapping[str, float]
    undesirable_weight: float
    label_smoothing: float | None
    rpo_scale: float
    dpop_penalty: float
    simpo_margin: float
    center: Center = "none"
    reward: RewardBy = "implicit"
    margin: Literal["none", "scores"] = "none"
    centering: float = 0.0
    named: frozenset[str] = frozenset()
    changed: frozenset[str] = frozenset()

    def losses_of(self, kind: Kind) -> Mapping[str, float]:
        """The losses of one kind of responses, with their weights; empty for a kind that a map does not name.

        Such a kind must not occur in the data, which is checked when the data is prepared.
        """
        return expanded(self.loss) if isinstance(self.loss, str) else expanded(self.loss.get(kind, {}))

    def beta_of(self, kind: Kind) -> float:
        """The beta of one kind; the default for a kind that a map does not name."""
        return self.beta.get(kind, DEFAULT_BETA) if isinstance(self.beta, Mapping) else self.beta

    def weight_of(self, kind: Kind) -> float:
        """The weight of one kind's loss; 1 for a kind that a map does not name."""
        return self.weights.get(kind, 1.0) if isinstance(self.weights, Mapping) else self.weights


def with_kinds(loss: Any) -> Any:
    """Check the form of a recipe's loss before pydantic checks its types, and return it unchanged.

    Raises:
        ValueError: a list or a map of losses is given instead of a map of kinds.
    """
    if isinstance(loss, list):
        raise ValueError(
            f"objective.loss: {loss} given; a sum of losses is a map with weights: {{pair: {{dpo: 1, nll: 0.2}}}}"
        )
    if not isinstance(loss, dict) or not any(name in LOSS_NAMES for name in loss):
        return loss
    if all(name in LOSS_NAMES for name in loss):
        shown = ", ".join(f"{name}: {weight}" for name, weight in loss.items())
        raise ValueError(
            f"objective.loss: {{{shown}}} given, without the kind that it is for; give it as {{pair: {{{shown}}}}}"
        )
    name = next(name for name in loss if name in LOSS_NAMES)
    raise ValueError(
        f"objective.loss: {name!r} is a loss, but the other keys are kinds; a sum is {{pair: {{dpo: 1, {name}: 0.2}}}}"
    )


def objective_problems(objective: GivenObjective, *, examples_per_step: int) -> Iterator[Problem]:
    """Problems of the objective that need no data: unknown losses, and losses and keys that cannot be combined."""
    yield from _of_weights(objective.weights)
    given = objective.loss if isinstance(objective.loss, Mapping) else {"pair": objective.loss}
    unknown = list(_unknown_losses(objective.loss))
    if unknown:  # the other checks would report the same problem again
        yield from unknown
        return
    for kind, loss in given.items():
        weights = expanded(loss)
        if not weights or not all(math.isfinite(weight) and weight > 0 for weight in weights.values()):
            yield f"loss.{kind}", f"{dict(weights)} given, expected losses with weights above 0"
        of_pairs = sorted(NEEDS_PAIRS & set(weights))
        if kind != "pair" and of_pairs:
            yield f"loss.{kind}", f"{loss if isinstance(loss, str) else of_pairs[0]!r} needs pairs"
    yield from policy_gradient_problems(objective)
    used = {name for loss in given.values() for name in expanded(loss)}
    if objective.reward == "head" or used & set(OF_HEAD):
        yield from _of_head(objective, used)
        yield from _of_keys(objective, used)
        return
    if isinstance(objective.beta, Mapping) and not objective.beta:
        yield "beta", "{} given, expected a number or a map from kind"
    misspelt = [kind for kind in objective.beta if kind not in KINDS] if isinstance(objective.beta, Mapping) else []
    yield from (("beta", unknown_name(kind, KINDS)) for kind in misspelt)
    # One loss for all kinds with a map of betas: which kinds count is known only from the data (`kind_problems`).
    if not misspelt and not (isinstance(objective.loss, str) and isinstance(objective.beta, Mapping)):
        yield from (("beta", problem) for problem in beta_problems(objective, given))
    yield from _of_shift(objective, used, examples_per_step)
    yield from center_problems(objective, examples_per_step)
    yield from _of_keys(objective, used)


_NOT_OF_HEAD = (
    "beta", "beta_schedule", "beta_end", "length_normalized", "reward_shift", "reward_shift_value",
    "reward_shift_decay", "center",
)  # fmt: skip
"""Keys that only implicit rewards read."""


def _of_head(objective: GivenObjective, used: set[str]) -> Iterator[Problem]:
    """Problems of a reward head's losses and keys, and of its loss without a head."""
    if objective.reward == "implicit":
        yield "loss", f"{OF_HEAD[0]!r} compares the rewards of a head; take dpo, or objective.reward: head"
        return
    for name in sorted(used - HEAD_LOSSES):
        instead = "bradley_terry, which is its form for a head" if name == "dpo" else "another"
        known = ", ".join(sorted(HEAD_LOSSES))
        yield "loss", f"{name!r} is not a loss of reward: head ({known}); take {instead}, or reward: implicit"
    for key in _NOT_OF_HEAD:
        if key in objective.changed:
            yield key, f"{getattr(objective, key)} given, but only implicit rewards have it; leave it out"


def _unknown_losses(loss: str | Mapping[str, str | Mapping[str, float]]) -> Iterator[Problem]:
    if isinstance(loss, str):
        if loss not in LOSS_NAMES:
            yield "loss", unknown_loss(loss, LOSS_NAMES)
        return
    if not loss:
        yield "loss", "no loss for any kind"
    for kind, of_kind in loss.items():
        if kind not in KINDS:
            yield "loss", unknown_name(kind, KINDS)
        known = LOSS_NAMES if isinstance(of_kind, str) else LOSSES
        for name in [of_kind] if isinstance(of_kind, str) else of_kind:
            if name not in known:
                yield f"loss.{kind}", unknown_loss(name, known)


def _of_shift(objective: GivenObjective, used: set[str], examples_per_step: int) -> Iterator[Problem]:
    shift = objective.reward_shift
    if shift != "none" and not used & set(POINTWISE):
        yield "reward_shift", f"{shift!r} given, but no loss is pointwise ({', '.join(POINTWISE)})"
    if shift == "constant" and "reward_shift_value" not in objective.named:
        yield "reward_shift_value", "not given; reward_shift: constant needs it"
    if shift in ("kl", "prompt_mean") and examples_per_step == 1:
        yield (
            "reward_shift",
            f"{shift!r} compares the responses of a step with each other, train.examples_per_step is 1",
        )


def _of_keys(objective: GivenObjective, used: set[str]) -> Iterator[Problem]:
    if objective.reward == "implicit":
        yield from _of_schedule(objective)
    smoothed = sorted(_READ_BY["label_smoothing"] & used)
    if smoothed and objective.label_smoothing is None:
        yield "label_smoothing", f"not given; {', '.join(smoothed)} needs it"
    if smoothed and objective.label_smoothing == 0:
        yield "label_smoothing", f"0 given, with which {smoothed[0]} is dpo; take dpo"
    if objective.length_normalized and "contrast" in used:
        yield "length_normalized", "true given, but cpo compares sums over tokens; take simpo"
        return
    for key, readers in _READ_BY.items():
        if objective.reward == "head" and key in _NOT_OF_HEAD:
            continue  # `_of_head` has refused it
        if key in objective.changed and not readers & (used | {objective.reward_shift}):
            yield (
                key,
                f"{getattr(objective, key)} given, but only {', '.join(sorted(readers))} would use it; leave it out",
            )


def _of_schedule(objective: GivenObjective) -> Iterator[Problem]:
    if objective.beta_end != 1.0 and objective.beta_schedule == "constant":
        yield "beta_end", f"{objective.beta_end} given, but beta_schedule is constant; take linear or cosine"
    if objective.beta_schedule != "constant" and objective.beta_end == 1.0:
        yield "beta_end", f"not given; beta_schedule: {objective.beta_schedule} needs it: beta's factor at the end"


def beta_problems(objective: GivenObjective, losses: Mapping[str, str | Mapping[str, float]]) -> Iterator[str]:
    """Problems of the betas with the losses of these kinds: the unit of beta depends on the loss."""
    beta = objective.beta
    used = {name for loss in losses.values() for name in expanded(loss)}
    if not isinstance(beta, Mapping) and not objective.length_normalized:
        a_token, a_nat = (sorted(USES_BETA & used & unit) for unit in (A_TOKEN, USES_BETA - A_TOKEN))
        if a_token and a_nat and len(losses) > 1:
            yield (
                f"{beta} for all kinds, but {a_token[0]} takes one per nat per token, {a_nat[0]} one per nat; give a "
                "map from kind"
            )
    if not isinstance(beta, Mapping) and "odds_ratio" in used and not used & USES_BETA and beta != DEFAULT_BETA:
        yield _NO_BETA_OF_ORPO.format(beta)
    for kind, loss in losses.items():
        names = USES_BETA & expanded(loss).keys()
        if isinstance(beta, Mapping) and "odds_ratio" in expanded(loss) and not names and kind in beta:
            yield _NO_BETA_OF_ORPO.format(beta[kind])
        a_token = sorted(names & A_TOKEN)
        if a_token and names - A_TOKEN and not objective.length_normalized:
            yield (
                f"{a_token[0]} takes one per nat per token, {sorted(names - A_TOKEN)[0]} one per nat: they cannot be "
                "summed"
            )
        is_given = kind in beta if isinstance(beta, Mapping) else "beta" in objective.named
        if names and not is_given and (a_token or objective.length_normalized):
            why = a_token[0] if a_token else "length_normalized"
            of_kind = f" for {kind}" if isinstance(beta, Mapping) else ""
            yield f"not given{of_kind}: the default {DEFAULT_BETA} is per nat, {why} takes one per nat per token"


_NO_BETA_OF_ORPO = "{} given, but orpo has no beta: its lambda is the weight of odds_ratio"


def _of_weights(weights: float | Mapping[str, float]) -> Iterator[Problem]:
    if not isinstance(weights, Mapping):
        weights = {"instruction": weights}  # the same weight for all kinds
        if weights["instruction"] == 0:
            yield "weights", "0 given: nothing would be learned"
    for kind, weight in weights.items():
        if kind not in KINDS:
            yield "weights", unknown_name(kind, KINDS)
        if not (math.isfinite(weight) and weight >= 0):
            yield "weights", f"{weight} given, must be finite and >= 0"


def kind_problems(objective: GivenObjective, data: PreparedData) -> Iterator[Problem]:
    """Problems that only the data can show: each kind of responses needs a loss.

    Kinds of held-out data need one too, because evaluation computes it.
    """
    held: dict[str, str | Mapping[str, float]] = {}
    for part, sources in (("data.sources", data.train), ("data.held_out", data.held_out)):
        for number, source in enumerate(sources):
            held |= {kind: objective.losses_of(kind) for kind in sorted(source.selection.kinds)}
            yield from (("loss", problem) for problem in _of_source(objective, source, f"{part}.{number}"))
            if objective.reward == "head":
                yield from _of_source_with_head(objective, source, f"{part}.{number}")
            if source.settings.asked is not None:
                yield from own_answer_problems(objective, source.settings.asked.answers, f"{part}.{number}")
    if isinstance(objective.loss, str) and isinstance(objective.beta, Mapping):  # the kinds are known only now
        yield from (("beta", problem) for problem in beta_problems(objective, held))
    trained = {kind for source in data.train for kind in source.selection.kinds}
    if not any(objective.weight_of(kind) for kind in trained):
        yield "weights", f"0 for {', '.join(sorted(trained))}, which is all that is trained on"


def _of_source_with_head(objective: GivenObjective, source: PreparedSource, place: str) -> Iterator[Problem]:
    """Problems of one source of a reward model; arguments as for `_of_source`."""
    kinds = source.selection.kinds
    if "instruction" in kinds:
        yield (
            "reward",
            f"head learns which response is better, but {place} {source.label} holds responses of kind 'instruction', "
            "which all count as good; leave the source out",
        )
    if objective.margin == "scores" and "pair" in kinds and source.account.scores is None:
        yield "margin", f"scores given, but no row of {place} {source.label} has scores of the two sides; take none"


def _of_source(objective: GivenObjective, source: PreparedSource, place: str) -> Iterator[str]:
    """Problems of one source. place: the source's key in the recipe."""
    is_split = source.settings.rules.split_pairs
    is_answered = place.startswith("data.sources") and source.settings.asked is None
    holds = f"{place} {source.label} holds"
    for kind in sorted(source.selection.kinds):
        losses = objective.losses_of(kind)
        if not losses:
            needed = ", and evaluation needs one" if place.startswith("data.held_out") else ""
            split = " (its pairs: split makes single responses of pairs)" if is_split else ""
            yield f"no loss for kind {kind!r}, which {holds}{needed}{split}"
        elif is_answered and (own := losses.keys() & set(POLICY_GRADIENT)):
            yield (
                f"{min(own)!r} trains on the policy's own answers, but {holds} responses of kind {kind!r}; take a "
                "pointwise loss, such as mse, which trains on both, or leave the source out"
            )
        elif kind != "pair" and NEEDS_PAIRS & losses.keys() and is_split:
            yield (
                f"{objective.loss!r} needs pairs, {place}.pairs: split makes single responses of those of "
                f"{source.label}; take pairs: keep"
            )
        elif kind != "pair" and NEEDS_PAIRS & losses.keys():
            yield (
                f"{objective.loss!r} needs pairs, {holds} responses of kind {kind!r}: give a loss for each kind, as in "
                f"{{pair: {objective.loss}, {kind}: mse}}"
            )
