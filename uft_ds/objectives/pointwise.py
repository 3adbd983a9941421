"""Pointwise losses: the implicit score of one response against its given score."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from uft_ds.objectives.implicit_reward import implicit_reward, implicit_score

Distance = Literal["mse", "bce", "l1"]


def pointwise_loss(log_ratios_R: Tensor, scores_R: Tensor, *, beta: float, distance: Distance) -> Tensor:
    """Distance between the implicit score and the given score, one value per response.

        r = beta * log_ratio                                         UFT (arXiv 2410.21438) Eq. 5
        mse: (sigmoid(r) - score)^2                                  Eq. 7 for score 1; UNA (2408.15339) Eq. 11, 13
        bce: -score log sigmoid(r) - (1 - score) log sigmoid(-r)     UNA Eq. 12, with soft labels
        l1:  |sigmoid(r) - score|                                    APO-zero for scores 0 and 1

    Args:
        log_ratios_R: [responses], nats, summed over tokens. Carries the gradient.
        scores_R: [responses], in [0, 1].
        beta: > 0, per nat.
    Returns:
        [responses], float32; finite for any finite log-ratio.
    """
    if distance == "bce":
        rewards_R = implicit_reward(log_ratios_R, beta)
        return F.binary_cross_entropy_with_logits(rewards_R, scores_R, reduction="none")
    error_R = implicit_score(log_ratios_R, beta) - scores_R
    return error_R.square() if distance == "mse" else error_R.abs()
