"""The table of losses: their names and the term of each.

This module does not import torch; the functions are in `pointwise`, `pairwise`, `likelihood` and `policy_gradient`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

Distance = Literal["mse", "bce", "l1", "raw"]
Term = Literal["response", "token", "pair"]

POINTWISE: tuple[Distance, ...] = get_args(Distance)
"""Losses of one response's implicit reward against its score."""

PAIRWISE = ("dpo", "cdpo", "robust", "ipo", "hinge", "rpo_sq", "rpo_fwd", "rpo_bwd", "dpop")
"""Losses of the two responses of a pair, each relative to the reference."""

REFERENCE_FREE = ("simpo", "contrast", "odds_ratio")
"""Losses of the two responses of a pair, without a reference."""

OF_HEAD = ("bradley_terry",)
"""Losses of the rewards that a head gives to the two responses of a pair: those of reward models."""

LIKELIHOOD = ("nll", "nll_sum")
"""-log pi(y|x), divided by the number of the step's tokens (nll) or of its responses (nll_sum, UFT Eq. 1)."""

PolicyGradient = Literal["rloo", "reinforce", "grpo"]
POLICY_GRADIENT: tuple[PolicyGradient, ...] = get_args(PolicyGradient)
"""-A log pi(y|x) of an answer that the policy itself has just given, where A is its advantage (`policy_gradient`)."""

OF_PROMPT: tuple[PolicyGradient, ...] = ("rloo", "grpo")
"""Losses that compare an answer with the policy's other answers to the same prompt."""

TERMS: Mapping[str, Term] = {
    **dict.fromkeys(POINTWISE, "response"),
    **dict.fromkeys((*PAIRWISE, *REFERENCE_FREE, *OF_HEAD), "pair"),
    "nll": "token",
    "nll_sum": "response",
    **dict.fromkeys(POLICY_GRADIENT, "response"),
}
"""The term of every loss: the sum over a step is divided by the number of these terms."""

LOSSES = tuple(TERMS)

PRESETS: Mapping[str, Mapping[str, float]] = {
    "orpo": {"nll": 1.0, "odds_ratio": 0.1},
    "cpo": {"nll": 1.0, "contrast": 1.0},
}
"""Losses that their papers define as sums, with the papers' weights."""

NEEDS_REFERENCE = frozenset((*POINTWISE, *PAIRWISE, *POLICY_GRADIENT))
"""Losses of implicit rewards or with a KL penalty; a pointwise loss of a head's rewards needs no reference either."""
NEEDS_PAIRS = frozenset((*PAIRWISE, *REFERENCE_FREE, *OF_HEAD))
HEAD_LOSSES = frozenset({"mse", "bce", *OF_HEAD})
"""All losses that a reward head can be trained by; only `OF_HEAD` can train nothing else."""
A_TOKEN = frozenset({"ipo", "simpo"})
"""These losses always compare means over tokens, so their beta is per nat per token, also without
`length_normalized`."""
READS_SCORES = frozenset((*POINTWISE, *POLICY_GRADIENT, "rpo_sq", "rpo_fwd", "rpo_bwd"))
USES_BETA = frozenset((*POINTWISE, *PAIRWISE, *POLICY_GRADIENT, "simpo", "contrast"))


def expanded(loss: str | Mapping[str, float]) -> Mapping[str, float]:
    """The losses of the table, with their weights, that a recipe's loss of one kind stands for."""
    return PRESETS.get(loss, {loss: 1.0}) if isinstance(loss, str) else loss
