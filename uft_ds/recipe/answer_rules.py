"""Rules for losses that compare answers to one prompt with each other, and for the policy's own answers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from uft_ds.data.example import KINDS
from uft_ds.objectives.losses import OF_PROMPT, POINTWISE, POLICY_GRADIENT, expanded

if TYPE_CHECKING:  # `rules` imports this module
    from uft_ds.recipe.rules import GivenObjective, Problem


def policy_gradient_problems(objective: GivenObjective) -> Iterator[Problem]:
    """Problems of losses of the policy's own answers that need no data."""
    if isinstance(objective.loss, str):
        if objective.loss in POLICY_GRADIENT:
            yield (
                "loss",
                f"{objective.loss!r} trains on the policy's own answers, which are of kind score; give it as "
                f"{{score: {objective.loss}}}, with losses of the other kinds beside it",
            )
        return
    for kind, loss in objective.loss.items():
        weights = expanded(loss)
        for name in (name for name in POLICY_GRADIENT if name in weights):
            if kind != "score":
                yield f"loss.{kind}", f"{name!r} trains on the policy's own answers, which are of kind score"
            elif len(weights) > 1:
                yield (
                    f"loss.{kind}",
                    f"{name!r} given in a sum; the kind's beta is its price of a nat, which other losses read "
                    f"differently: give {name} alone",
                )
            elif objective.length_normalized:
                yield "length_normalized", f"true given, but {name} compares sums over tokens; leave it out"


def center_problems(objective: GivenObjective, examples_per_step: int) -> Iterator[Problem]:
    """Problems of `center` that need no data."""
    if objective.center == "none":
        return
    losses = {name for kind in KINDS if kind != "instruction" for name in objective.losses_of(kind)}
    if not losses & set(POINTWISE):
        yield (
            "center",
            "prompt given, but no kind other than instruction has a pointwise loss (mse, l1, raw); instruction data "
            "has one score, with nothing to compare, and rloo and grpo have baselines of their own; leave it out",
        )
    if "bce" in losses:
        yield (
            "center",
            "prompt given, but its targets, 1/2 + score - mean score, may leave [0, 1], and then bce has no minimum: "
            "it falls without end as the reward grows; take mse, l1 or raw",
        )
    if objective.reward_shift != "none":
        yield (
            "center",
            f"prompt given, which is a reward shift itself; leave out reward_shift: {objective.reward_shift}",
        )
    if examples_per_step == 1:
        yield "center", "prompt compares the responses of a step with each other, train.examples_per_step is 1"


def sampling_problems(objective: GivenObjective, temperature: float, top_p: float) -> Iterator[Problem]:
    """Problems of how the recipe's generator draws answers, by the generator's keys."""
    losses = objective.losses_of("score")
    for loss in (name for name in POLICY_GRADIENT if name in losses):
        for key, value in (("temperature", temperature), ("top_p", top_p)):
            if value != 1.0:
                yield (
                    key,
                    f"{value:g} given, but the gradient of {loss} is that of answers drawn from the policy itself; "
                    "take 1, or a pointwise loss, such as mse with center: prompt",
                )


def own_answer_problems(objective: GivenObjective, answers: int, place: str) -> Iterator[Problem]:
    """Problems of an objective with an online source, each of whose prompts the policy answers so many times.

    Args:
        place: the source's key in the recipe.
    """
    if answers >= 2:
        return
    too_few = f"compares the answers to one prompt with each other, but {place}.answers is {answers}; take 2 or more"
    losses = objective.losses_of("score")
    for name in OF_PROMPT:
        if name in losses:
            yield "loss", f"{name!r} {too_few}"
    if objective.center == "prompt" and losses.keys() & set(POINTWISE):
        yield "center", f"prompt {too_few}"
